"""Whose trajectories: the first of a method's two slots. Filtering, judging, mixing and replay wrap other sources."""

from tutelage.sources.accepted import Accepted, Keep
from tutelage.sources.beside import Beside
from tutelage.sources.drawn import Drawn
from tutelage.sources.hinted import Hinted
from tutelage.sources.judged import Judged
from tutelage.sources.mixed import Mixed, Pooled
from tutelage.sources.paths import Paths
from tutelage.sources.recorded import Recorded
from tutelage.sources.refill import Refilled
from tutelage.sources.replay import Replay
from tutelage.sources.streamed import Streamed
from tutelage.sources.thresholds import RisingThresholds

__all__ = [
    "Accepted",
    "Beside",
    "Drawn",
    "Hinted",
    "Judged",
    "Keep",
    "Mixed",
    "Paths",
    "Pooled",
    "Recorded",
    "Refilled",
    "Replay",
    "RisingThresholds",
    "Streamed",
]
