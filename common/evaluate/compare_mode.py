"""`--mode=compare`: runs side by side, also while they train. No devices, data or encoder."""

from collections.abc import Sequence

from etils import epath

from common.errors import UserError
from common.evaluate import compare_picture, compare_runs, compare_table
from common.run import files

DEFAULT = "comparison"  # where the files go without --workdir
PICTURE, CSV, MARKDOWN = "compare.png", "compare.csv", "compare.md"


def compare(workdirs: Sequence[str], out: str | None = None) -> None:
    """Prints a table of runs, and writes it with a picture of their curves.

    Args:
        workdirs: of the runs: directories, patterns, or NAME=DIRECTORY.
        out: directory for the three files; None: `DEFAULT`.

    Raises:
        UserError: a workdir without a run; a directory that holds anything but a comparison.
    """
    directory = _directory(out or DEFAULT)
    runs, skipped = compare_runs.find(workdirs)
    fields = compare_table.differing(runs)
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / CSV, compare_table.as_csv(runs, fields))
    files.write_text(directory / MARKDOWN, compare_table.markdown(runs, fields))
    files.write_bytes(directory / PICTURE, compare_picture.draw(runs))
    # print and not `console`, which asks for this process's index, and so takes the devices
    print(compare_table.text(runs, fields))
    if skipped:
        print(f"\n{skipped} {'directory' if skipped == 1 else 'directories'} without a run skipped")
    print(f"\nCurves: {directory / PICTURE}, tables: {directory / CSV}, {MARKDOWN}")


def _directory(text: str) -> epath.Path:
    """The directory for the files, which may hold an earlier comparison and nothing else."""
    path = files.path(text)
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={text} is a file: give a directory for the comparison")
    ours = {PICTURE, CSV, MARKDOWN}
    names = {p.name.removesuffix(".tmp") for p in path.iterdir()} if path.exists() else ()
    if others := sorted(set(names) - ours):
        raise UserError(
            f"{text} holds other things than a comparison (e.g. {others[0]}): give a new or empty "
            "directory as --workdir; without the flag it is comparison/"
        )
    return path
