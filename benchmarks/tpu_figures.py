"""The two tables and the plot of `benchmarks.tpu_plans`."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from common.run import pictures
from common.setup import make_setup
from common.sharding import make_mesh
from moco_jax import shuffle

BEGIN, END = "<!-- benchmarks.tpu_plans begin -->", "<!-- benchmarks.tpu_plans end -->"
Rows = list[dict[str, Any]]
COLOURS = {  # of what `theory` names
    "gradients": "#4c72b0", "batch statistics": "#dd8452", "shuffled images (uint8)": "#55a868",
    "embeddings": "#c44e52", "ids, log-sum-exps": "#8172b3",
}  # fmt: skip


def theory(
    make_method: Callable, config: ConfigDict, devices: int, num_classes: int = 1000
) -> dict[str, float]:
    """Bytes that a device contributes to or receives from collectives in one step, by purpose.

    Counted as `common.plan.collectives.Collective.bytes`: of an all-reduce the array, of a gather
    what comes out, of a reduce-scatter what goes in.
    """
    built = make_method(make_setup(config, make_mesh(jax.devices()[:1]), 10_000, 10, num_classes))
    state = jax.eval_shape(built.init, jax.random.key(0))
    batch, dim = config.batch_size, config.head.dim
    resnet, watched = config.model.encoder == "resnet", built.setup.network.backbone.watched
    folded = _folded(state) if resnet and config.model.fold_norm else {}
    # The gradient of a parameter has the type of the arithmetic, except of those that are used in
    # float32: norms, and kernels with a folded norm. MoCo v3's two passes give two, which are added
    # in float32: two sums over the devices in bfloat16, or else one in float32, which is as much.
    half = 2 if config.model.dtype == "bfloat16" and config.method != "moco_v3" else 4
    parts = {"gradients": 4.0 * sum(x.size for x in jax.tree.leaves(state.probe.params))}
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        names = tuple(k.key for k in path)
        if names[:2] in built.setup.network.frozen and names[1] != watched:
            continue  # (the norm of a watched gradient is logged, whatever the optimiser does)
        plain = x.ndim > 1 and names not in folded
        plain |= not resnet and names[0] == "backbone" and not _is_norm(names)
        parts["gradients"] += x.size * (half if plain else 4)
    channels = _channels(state.batch_stats)
    if config.method == "simclr":
        # Sums over the devices: forward two a channel; where the norm is folded the moments of the
        # input (c^2 + c). Backward two a channel, but those are the gradients of scale and shift.
        parts["batch statistics"] = 4.0 * 2 * channels
        for kernel in folded.values():
            c, d = kernel.shape[2:]
            parts["batch statistics"] += 4.0 * (c * (c + 1) - 2 * d)
        parts["embeddings"] = 4.0 * 2 * batch * dim  # gathered once; the backward pass needs no sum
        # an id each; backwards the log-sum-exps and their cotangents
        parts["ids, log-sum-exps"] = 4.0 * 2 * batch * 3
        if config.simclr.memory_length:
            # the momentum encoder's pass: forward as above, and nothing backward
            parts["batch statistics"] += 4.0 * 2 * _channels(state.key_batch_stats)
            for kernel in folded.values():
                c, d = kernel.shape[2:]
                parts["batch statistics"] += 4.0 * (c * (c + 1) - 2 * d)
            # keys instead of embeddings; rows gathered, their gradients reduced; as MoCo's below
            parts["embeddings"] += 4.0 * dim * 2 * 2 * batch
            parts["ids, log-sum-exps"] = 4.0 * 2 * batch * 5
    elif config.method == "moco_v3":
        # Each view goes through both encoders: forward as above, four times; backward two a channel
        # and view, of which the gradients of scale and shift are the sums.
        views, keys = 2, _channels(state.key_batch_stats)
        parts["batch statistics"] = 4.0 * views * (2 * (channels + keys) + 2 * channels)
        parts["batch statistics"] -= 4.0 * 2 * channels
        for kernel in folded.values():
            c, d = kernel.shape[2:]
            # of a folded kernel each view has a gradient that is summed before it goes on
            parts["batch statistics"] += 4.0 * (2 * views * (c * (c + 1) - 2 * d) + c * d)
        parts["embeddings"] = 4.0 * views * batch * dim  # keys gathered; they have no gradient
    else:
        size, groups = config.data.image_size, config.model.bn_groups
        parts["batch statistics"] = 4.0 * 2 * channels * 2  # the running ones, of two encoders
        if groups < devices:  # summed over the devices of a group: twice forward, once backward
            parts["batch statistics"] += 4.0 * 2 * channels * 3
            for kernel in folded.values():
                c, d = kernel.shape[2:]
                # moments of the input; backward, the gradient of the group's kernel
                parts["batch statistics"] += 4.0 * (2 * (c * (c + 1) - 2 * d) + c * d)
        sends = shuffle.sends(devices, groups, batch // groups)
        parts["shuffled images (uint8)"] = sends * batch / devices * size * size * 3
        # queries gathered, their gradients reduced, keys dealt back
        parts["embeddings"] = 4.0 * dim * (2 * batch + batch / devices)
        # forward: thresholds, maxima, sums and ranks; backward: cotangents
        parts["ids, log-sum-exps"] = 4.0 * batch * 5
    return parts


def _channels(batch_stats: Any) -> int:
    """Of all batch norms together."""
    return sum(x.size for x in jax.tree.leaves(batch_stats)) // 2


def _is_norm(names: tuple[str, ...]) -> bool:
    return any(name.startswith(("norm", "bn")) for name in names)


def _folded(state: Any) -> dict[tuple[str, ...], Any]:
    """The kernels that hold a batch norm: 1x1 convolutions of bottlenecks that widen."""
    backbone = state.params["backbone"]
    return {
        ("backbone", block, conv, "kernel"): x["kernel"]
        for block, convs in backbone.items()
        for conv, x in convs.items()
        if "conv3" in convs
        and isinstance(x, dict)
        and getattr(x.get("kernel"), "ndim", 0) == 4
        and x["kernel"].shape[:2] == (1, 1)
        and x["kernel"].shape[3] > x["kernel"].shape[2]
    }


def changes(found: Sequence[tuple[str, Rows]], title: str) -> str:
    """The gain of each change over the baseline, in Markdown."""
    base = next((rows[0] for name, rows in found if name == "baseline" and rows), None)
    lines = [
        f"| {title}, a chip and step | GB accessed | of the baseline | HBM GB | temporaries GiB | "
        "of the baseline | peak GiB | TFLOP | arithmetic / GB accessed | arithmetic / HBM | "
        "compile CPU s |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, rows in found:
        if not rows:
            continue
        if not (row := rows[0]).get("fits"):
            empty = "| " * 5
            lines.append(f"| {name} | does not fit | | | | | {row.get('peak_gib', '')} {empty}|")
            continue
        ratios = ["", ""]
        if base:
            ratios = [f"{row[n] / base[n]:.2f}" for n in ("gb_accessed", "temporaries_gib")]
        seconds = row["compile_seconds"]  # None: the machine was too busy to measure it
        shares = [f"{share(row, n):.2f}" for n in ("gb_accessed", "hbm_gb")]
        lines.append(
            f"| {name} | {row['gb_accessed']:.1f} | {ratios[0]} | {row['hbm_gb']:.1f} | "
            f"{row['temporaries_gib']:.2f} | {ratios[1]} | {row['peak_gib']:.2f} | "
            f"{row['tflop']:.2f} | {shares[0]} | {shares[1]} | "
            f"{'-' if seconds is None else round(seconds)} |"
        )
    return "\n".join(lines)


def share(row: dict[str, Any], traffic: str) -> float:
    """Time of the arithmetic, as a fraction of that or of the traffic, whichever is longer."""
    arithmetic = 1e3 * row["tflop"] / row["rates"]["tflops"]
    return arithmetic / max(arithmetic, 1e3 * row[traffic] / row["rates"]["hbm_gb_per_s"])


def table(found: Sequence[tuple[str, Rows]], theory_of: Callable | None = None) -> str:
    """The plans of the configs, in Markdown.

    Args:
        found: (name, rows) of each plan.
        theory_of: `theory` of a method, a batch and a number of devices: adds a column.
    """
    columns = [
        "config", "batch", "slice", "chips", "effort", "remat", "peak GiB of", "TFLOP", "GB",
        "arithmetic ms", "memory ms", "ICI ms", "images/s", "hours",
    ]  # fmt: skip
    if theory_of:
        columns.append("collectives MB / theory")
    lines = [_line(columns), _line(["---" if c in ("config", "slice", "effort", "remat") else "--:"
                                    for c in columns])]  # fmt: skip
    for _, rows in found:
        for r in rows:
            name, topology, batch, changes = r["job"]
            method, _, argument = name.partition(":")
            config = [f"`{method}_tpu.py{':' * bool(argument)}{argument}`"]
            config += [f"{k.rpartition('.')[2]} {v}" for k, v in changes.items()]
            cells = [", ".join(config), f"{batch}", topology]
            if "error" in r:
                lines.append(_line([*cells, r["error"]]))
                continue
            effort = "quick" if r.get("quick") else "full"
            peak = f"{r['peak_gib']:.1f} of {r['hbm_gib']}"
            cells += [f"{r['chips']}", effort, r["remat"], peak]
            if r["fits"]:
                cells += [
                    f"{r['tflop']:.2f}", f"{r['gb_accessed']:.1f}", f"{r['arithmetic_ms']:.1f}",
                    f"{r['memory_ms']:.1f}", f"{r['ici_ms']:.2f}", f"{r['images_per_second']:,}",
                    f"{r['hours']:.2f}",
                ]  # fmt: skip
                if theory_of:
                    sent = sum(c["bytes"] for c in r["collectives"].values())
                    wanted = sum(theory_of(name, batch, r["devices"]).values())
                    theory = "" if changes else f" / {wanted / 1e6:.1f}"  # it is of the config's
                    cells.append(f"{sent / 1e6:.1f}{theory}")
            else:
                cells[-1] += ", **does not fit**"
            lines.append(_line(cells + [""] * (len(columns) - len(cells))))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def write(page: pathlib.Path, *parts: str) -> None:
    """Puts the parts between the markers of a page, a blank line between them."""
    head, begin, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}")
    page.write_text("\n".join([head + BEGIN, "", *(p + "\n" for p in parts), END + tail]))


def draw(rows: Rows, theories: dict[str, Callable], path: pathlib.Path) -> None:
    """Measured and theoretical collective bytes by the number of chips.

    Args:
        rows: of plans that grow; those of a method by their chips.
        theories: a method's `theory` of a batch and a number of devices.
        path: PNG to write.
    """
    figure, shown = pictures._figure(9.0, 3.8, top=0.1), {}
    for axes, method in zip(figure.subplots(1, 2), theories, strict=True):
        found = sorted((r for r in rows if r["method"] == method), key=lambda r: r["chips"])
        bottom, places = [0.0] * len(found), range(len(found))
        parts = [theories[method](r["batch"], r["devices"]) for r in found]
        for name in parts[0] if parts else ():
            heights = [p[name] / 1e6 for p in parts]
            shown[name] = axes.bar(places, heights, bottom=bottom, width=0.6, color=COLOURS[name])
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        total = [sum(c["bytes"] for c in r["collectives"].values()) / 1e6 for r in found]
        (shown["compiled step"],) = axes.plot(places, total, "k_", markersize=26, markeredgewidth=2)
        axes.set_xticks(list(places), [f"{r['chips']}\n{r['batch']}" for r in found])
        axes.set(title=method, xlabel="chips, global batch", ylabel="MB a chip and step")
        for r, t, b in zip(found, total, bottom, strict=True):
            print(f"{method} {r['chips']} chips: {t:.2f} MB compiled, {b:.2f} MB theory")
    shown["compiled step"] = shown.pop("compiled step")  # last, drawn after the parts of the theory
    names = ["theory: " + name if name in COLOURS else name for name in shown]
    figure.legend(shown.values(), names, fontsize=8, frameon=False, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    pictures._save(figure, path)
