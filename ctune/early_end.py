"""What the wish to finish a run early does to its stages.

It acts once, on the stage that trains when it is noticed: that stage ends with its present step.
The stages behind it are left out, but for those that complete the model (`StagePlan.finishing`),
which are done whole. A wish that comes

- before the first stage has made a step acts after that step: an encoder that was not tuned at all
  is worth no export;
- between two stages leaves the next one out;
- before a finishing stage has begun changes nothing: that stage is done whole.

What was decided goes into every checkpoint, so that a resumed run does not train on.
"""

from collections.abc import Callable, Sequence

from ctune.events import EventBase, Warned
from ctune.methods.base import StagePlan
from ctune.schema import JsonObject, Schema


class EndedStage(Schema):
    """The stage that ended before its time, or was left out: step 0."""

    stage: str
    step: int
    total_steps: int


class EarlyState(Schema):
    """What a resumed run must remember."""

    taken: bool = False
    """The wish has had its effect."""
    ended: EndedStage | None = None


class EarlyEnd:
    """The decisions of one run."""

    def __init__(self, wished: Callable[[], bool], *, emit: Callable[[EventBase], None]) -> None:
        """Begin without a decision.

        Args:
            wished: whether the run is to finish early; the same answer on all ranks.
        """
        self.state = EarlyState()
        self._wished = wished
        self._emit = emit

    @property
    def ended(self) -> JsonObject | None:
        """What ended before its time, as the run's result tells it."""
        return self.state.ended.model_dump() if self.state.ended else None

    def leaves_out(self, plan: StagePlan, step: int, *, is_first: bool) -> bool:
        """Return whether a stage that stands at `step` is not to be trained (any further)."""
        if not self.state.taken and self._wished():
            if step == 0 and plan.finishing:
                self.state = EarlyState(taken=True)
            elif step > 0 or not is_first:
                self._end(plan, step)
        ended = self.state.ended
        return ended is not None and (not plan.finishing or ended.stage == plan.name)

    def ends(self, plan: StagePlan, step: int) -> bool:
        """Return whether a stage that trains ends with the `step` steps it has made."""
        if self.state.taken or not self._wished():
            return False
        self._end(plan, step)
        return True

    def image_passes(self, plans: Sequence[StagePlan]) -> int:
        """Return how many images the encoder saw in training, every view counted."""
        ended = self.state.ended
        if ended is None:
            return sum(plan.image_passes for plan in plans)
        at = [plan.name for plan in plans].index(ended.stage)
        whole = [*plans[:at], *(plan for plan in plans[at + 1 :] if plan.finishing)]
        part = plans[at].image_passes * ended.step / ended.total_steps
        return sum(plan.image_passes for plan in whole) + round(part)

    def _end(self, plan: StagePlan, step: int) -> None:
        ended = EndedStage(stage=plan.name, step=step, total_steps=plan.total_steps)
        self.state = EarlyState(taken=True, ended=ended)
        what = f"ends at step {step} of {plan.total_steps}" if step else "is left out"
        self._emit(
            Warned(
                code="stopped_early",
                message=f"stage {plan.name!r} {what}: somebody asked the run to finish early",
                hint="what is measured from here on is of this shorter training",
                details=ended.model_dump(),
            )
        )
