"""The losses in NumPy, in float64 and with all their logits: values and gradients by hand."""

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nt_xent(z1, z2, temperature):
    """Chen et al. eq. 1 averaged over 2N rows, and its gradient, with full logits."""
    z = np.concatenate([z1, z2]).astype(np.float64)
    n = len(z1)
    length = np.linalg.norm(z, axis=1, keepdims=True)
    unit = z / length
    logits = unit @ unit.T / temperature
    np.fill_diagonal(logits, -np.inf)
    positive = np.roll(np.arange(2 * n), n)
    own = np.arange(2 * n), positive
    top = logits.max(axis=1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    d_logits = np.exp(log_probs) / (2 * n)
    d_logits[own] -= 1 / (2 * n)
    d_unit = (d_logits + d_logits.T) @ unit / temperature
    d_z = (d_unit - unit * (unit * d_unit).sum(axis=1, keepdims=True)) / length
    return -log_probs[own].mean(), np.split(d_z, 2)


def dcl(z1, z2, temperature):
    """Yeh et al. eq. 6 averaged over 2N rows, and its gradient, row by row from the definition."""
    z = np.concatenate([z1, z2]).astype(np.float64)
    n, length = len(z1), np.linalg.norm(z, axis=1, keepdims=True)
    u, loss, d_unit = unit(z), 0.0, np.zeros_like(z)
    for i in range(2 * n):
        other_view = (i + n) % (2 * n)
        negatives = [j for j in range(2 * n) if j not in (i, other_view)]
        logits = u[negatives] @ u[i] / temperature
        top = logits.max()
        total = np.exp(logits - top).sum()
        loss += (top + np.log(total) - u[i] @ u[other_view] / temperature) / (2 * n)
        share = np.exp(logits - top) / total / (2 * n * temperature)
        d_unit[i] += share @ u[negatives] - u[other_view] / (2 * n * temperature)
        d_unit[negatives] += share[:, None] * u[i]
        d_unit[other_view] -= u[i] / (2 * n * temperature)
    d_z = (d_unit - u * (u * d_unit).sum(axis=1, keepdims=True)) / length
    return loss, np.split(d_z, 2)


def with_memory(z1, z2, k1, k2, memory, temperature, decoupled=False):
    """NT-Xent, or DCL, of embeddings against keys k1 and k2 of the views and those of a memory.

    Every row has a line of 2N - 2 + K logits of negatives, written out. Gradients by z1 and z2.
    """
    z = np.concatenate([z1, z2]).astype(np.float64)
    n, length = len(z1), np.linalg.norm(z, axis=1, keepdims=True)
    u, keys, other_view = unit(z), unit(np.concatenate([k1, k2])), np.roll(np.arange(2 * n), n)
    others = [[j for j in range(2 * n) if j % n != i % n] for i in range(2 * n)]
    others = np.array(others, int).reshape(2 * n, 2 * n - 2)
    logits = np.concatenate([(u[:, None] * keys[others]).sum(-1), u @ memory.T], 1) / temperature
    positive = (u * keys[other_view]).sum(1) / temperature
    top = np.maximum(logits.max(1), positive)
    negatives = np.exp(logits - top[:, None])
    own = np.exp(positive - top) * (not decoupled)
    total = negatives.sum(1) + own
    d_logits = negatives / total[:, None] / (2 * n * temperature)
    d_positive = (own / total - 1) / (2 * n * temperature)
    d_unit = d_logits[:, 2 * n - 2 :] @ memory + d_positive[:, None] * keys[other_view]
    d_unit += (d_logits[:, : 2 * n - 2, None] * keys[others]).sum(1)
    d_z = (d_unit - u * (u * d_unit).sum(axis=1, keepdims=True)) / length
    return (top + np.log(total) - positive).mean(), np.split(d_z, 2)


def supcon(z1, z2, labels, temperature):
    """Khosla et al. eq. 2 averaged over 2N rows, and its gradient, from full logits and masks.

    The positives of a row: all others of its class, and its own other view without a label.
    """
    z = np.concatenate([z1, z2]).astype(np.float64)
    n, length = len(z1), np.linalg.norm(z, axis=1, keepdims=True)
    u, labels, image = unit(z), np.tile(labels, 2), np.tile(np.arange(n), 2)
    itself = np.eye(2 * n, dtype=bool)
    same = (labels[:, None] == labels) & (labels >= 0)[:, None]
    positive = (same | (image[:, None] == image)) & ~itself
    logits = u @ u.T / temperature
    logits[itself] = -np.inf
    top = logits.max(axis=1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    share = positive / positive.sum(axis=1, keepdims=True)
    loss = -np.where(positive, log_probs, 0)[positive] @ share[positive] / (2 * n)
    d_logits = (np.exp(log_probs) - share) / (2 * n)
    d_unit = (d_logits + d_logits.T) @ u / temperature
    d_z = (d_unit - u * (u * d_unit).sum(axis=1, keepdims=True)) / length
    return loss, np.split(d_z, 2)


def info_nce(queries, keys, negatives, temperature):
    """He et al. eq. 1 averaged over the batch and its gradient by `queries`, with all logits."""
    queries, keys, negatives = (np.asarray(x, np.float64) for x in (queries, keys, negatives))
    length = np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-6)
    q, k = queries / length, unit(keys)
    logits = np.concatenate([(q * k).sum(axis=1, keepdims=True), q @ negatives.T], axis=1)
    logits /= temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probs = np.exp(log_probs)
    d_q = (probs[:, :1] - 1) * k + probs[:, 1:] @ negatives
    d_q /= temperature * len(q)
    return -log_probs[:, 0].mean(), (d_q - q * (q * d_q).sum(axis=1, keepdims=True)) / length


def ctr(queries, keys, temperature):
    """Chen et al. 2021, algorithm 1, `ctr`, and its gradient by `queries`, with all logits."""
    queries, keys = (np.asarray(x, np.float64) for x in (queries, keys))
    length = np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-6)
    q, k = queries / length, unit(keys)
    logits = q @ k.T / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -2 * temperature * np.diagonal(log_probs).mean()
    d_q = 2 * (np.exp(log_probs) @ k - k) / len(q)
    return loss, (d_q - q * (q * d_q).sum(axis=1, keepdims=True)) / length
