"""Questions are looked at before anything is sampled: can they be judged, does the template show them whole?"""

from typing import TYPE_CHECKING, Any

from tutelage.types import Task

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench


def checked_tasks(settings: Any, bench: "Workbench") -> list[Task]:
    """A stage's training questions. What the chat template drops of them is noted for the person who runs it.

    Raises:
        VerifierError: the stage's verifier could judge no answer to some of them; the message says how many and why.
    """
    tasks = bench.train_tasks(settings.tasks)
    if settings.verifier is not None:
        verifier = bench.verifier(settings.verifier)
        if (check := getattr(verifier, "check", None)) is not None:
            check([*tasks, *bench.heldout_tasks(settings.tasks)])
    for sentence in bench.text.check_prompts(tasks):
        note = f"stage {settings.name!r}: {sentence}"
        if note not in bench.notes:
            bench.notes.append(note)
    return tasks
