"""Weights for other libraries, and theirs for this one.

`layout` names and shapes arrays as torchvision does, `formats` reads and writes files of arrays,
`weights` makes one form of everything that can be read, `start` begins a run from it, `export_mode`
writes.
"""
