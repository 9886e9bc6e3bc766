"""Where the fine-tuned networks of a run lie: `<workdir>/finetuned/NAME.safetensors`."""

from etils import epath

from common.errors import UserError
from common.models.classifier import SUFFIX
from common.run import files, saved_config

FOLDER = "finetuned"


def find(text: str, field: str) -> epath.Path:
    """The file of a fine-tuned network.

    Args:
        text: the file, or a workdir that has exactly one.
        field: of the config, for messages, e.g. "distil.teacher".

    Raises:
        UserError: nothing is there, or several are.
    """
    path = files.path(text)
    if not path.is_dir():
        if not path.exists():
            raise UserError(
                f"{field}={text}: there is no such file or directory; give a fine-tuned network, "
                f"WORKDIR/{FOLDER}/NAME{SUFFIX}, or the workdir of one"
            )
        if path.suffix != SUFFIX:
            raise UserError(
                f"{field}={text}: this is no file of a fine-tuned network, give "
                f"WORKDIR/{FOLDER}/NAME{SUFFIX}"
            )
        return path
    folder = path / FOLDER
    found = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    if not found and not (path / saved_config.FILE).exists():
        raise UserError(
            f"{field}={text}: this is no run's workdir and has no fine-tuned network; give "
            f"WORKDIR/{FOLDER}/NAME{SUFFIX}, or the workdir of one"
        )
    if not found and saved_config.read(path).get("method") == "distil":
        raise UserError(
            f"{text} is a student whose run has not ended, and it is saved at the end: give the "
            "command of its --mode=distil again"
        )
    if not found:
        raise UserError(
            f"{field}={text}: this run has no fine-tuned network; make one with python main.py "
            f"--mode=finetune --workdir={text}"
        )
    if len(found) > 1:
        flag = field if field.startswith("eval.") else f"config.{field}"
        names = ", ".join(p.name for p in found[:6]) + (" ..." if len(found) > 6 else "")
        raise UserError(
            f"{text} has {len(found)} fine-tuned networks, name one with --{flag}=FILE, of those "
            f"in {folder}: {names}"
        )
    return found[0]
