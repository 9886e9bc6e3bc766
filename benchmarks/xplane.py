"""The events of a device, read from a profile (`*.xplane.pb`) of `jax.profiler`."""

import os
import pathlib
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from common.errors import UserError


class Event(NamedTuple):
    """An event on a device.

    Attributes:
        name: of the HLO instruction; "" where the profile has none.
        start: nanoseconds.
        duration: nanoseconds.
        kernel: name of the GPU kernel or copy; "" on others.
    """

    name: str
    start: float
    duration: float
    kernel: str = ""


def read(directory: str | os.PathLike) -> list[Event]:
    """Events of the first device, from the newest profile below a directory.

    On a CPU an operation may go on in other threads when its event is over: it lasts until the
    event that marks its end.

    Raises:
        UserError: if there is no profile, or no device in it.
    """
    paths = sorted(pathlib.Path(directory).rglob("*.xplane.pb"), key=os.path.getmtime)
    if not paths:
        raise UserError(f"{directory}: no *.xplane.pb below it: expected what jax.profiler writes")
    planes = {plane.name: plane for plane in ProfileData.from_file(os.fspath(paths[-1])).planes}
    found = []
    for name in sorted(planes):
        lines = list(planes[name].lines)
        if name.startswith("/device:GPU:"):
            streams = (e for line in lines if line.name.startswith("Stream") for e in line.events)
            found = [
                Event(str(dict(e.stats).get("hlo_op", "")), e.start_ns, e.duration_ns, e.name)
                for e in streams
            ]
        elif name.startswith("/device:TPU:"):
            # an event's name is the text of the instruction, "%fusion.1 = ..."
            operations = (e for line in lines if line.name == "XLA Ops" for e in line.events)
            found = [
                Event(e.name.split(" = ")[0].lstrip("%"), e.start_ns, e.duration_ns)
                for e in operations
            ]
        if found:
            return found
    found = _of_cpu(planes["/host:CPU"]) if "/host:CPU" in planes else []
    if not found:
        raise UserError(f"{paths[-1]}: no operation of a device in it: trace a step that runs")
    return found


def _of_cpu(plane: Any) -> list[Event]:
    begun, ends = [], {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                stats = dict(event.stats)
                ends[stats.get("_ct"), stats.get("_c")] = event.start_ns
            elif not event.name.startswith("$"):  # not a function of Python
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    begun.append((event, stats))
    found = []
    for event, stats in begun:
        end = ends.get((stats.get("_pt"), stats.get("_p")), event.end_ns)
        found.append(
            Event(stats["hlo_op"], event.start_ns, max(end, event.end_ns) - event.start_ns)
        )
    return found
