"""Whose trajectories: the first of a method's two slots. Filtering, judging, mixing and replay wrap other sources."""

from tutelage.sources.accepted import Accepted, Keep
from tutelage.sources.drawn import Drawn
from tutelage.sources.judged import Judged
from tutelage.sources.mixed import Mixed
from tutelage.sources.recorded import Recorded
from tutelage.sources.replay import Replay

__all__ = ["Accepted", "Drawn", "Judged", "Keep", "Mixed", "Recorded", "Replay"]
