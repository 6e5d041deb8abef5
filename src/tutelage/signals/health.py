"""What to watch while distilling: divergence by teacher and by position, and how much top-k mass the two share.

Dimension letters:  C  targets of a chunk   V  vocabulary   K  entries compared
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EDGES = (16, 64, 256, 1024)
"""Position buckets: targets before the 16th of their trajectory, before the 64th, and so on."""
_ROWS_COMPARED = 64
"""Targets of each microbatch whose top-k sets are compared: sorting all of them would cost more than the loss."""


class Health:
    """Sums over the targets of the losses that ran. Sums add up over microbatches and processes; means come last."""

    def __init__(self, names: Sequence[str], *, overlap_k: int) -> None:
        self.names, self.overlap_k = tuple(names), overlap_k
        self._sums: dict[str, Tensor] = {}
        self._every = self._num_seen = 0

    def begin_microbatch(self, num_targets: int) -> None:
        """Compare every so many-th of its targets, first and last ones alike, however it is cut into chunks."""
        self._every, self._num_seen = max(1, -(-num_targets // _ROWS_COMPARED)), 0

    @torch.no_grad()
    def add(self, nats_C: Tensor, columns_C: Mapping[str, Tensor]) -> None:
        """Count a chunk's divergences under its teachers and positions."""
        nats_C = nats_C.detach().double()
        used_C = (columns_C["weight_C"] != 0).double() if "weight_C" in columns_C else torch.ones_like(nats_C)
        if "target_index_C" in columns_C:
            edges = torch.tensor(EDGES, device=nats_C.device)
            bucket_C = torch.bucketize(columns_C["target_index_C"], edges, right=True)
            self._count("position", bucket_C, len(EDGES) + 1, nats_C, used_C)
        teacher_C = columns_C.get("teacher_C", torch.zeros_like(nats_C, dtype=torch.int64))
        self._count("teacher", teacher_C, len(self.names), nats_C, used_C)

    def _count(self, what: str, group_C: Tensor, size: int, nats_C: Tensor, used_C: Tensor) -> None:
        zero = torch.zeros(size, dtype=torch.float64, device=nats_C.device)
        self._add(f"{what}_nats", zero.index_add(0, group_C, torch.where(used_C > 0, nats_C, 0.0)))
        self._add(f"{what}_targets", zero.index_add(0, group_C, used_C))

    @torch.no_grad()
    def compare(self, student_CV: Tensor, teacher_CV: Tensor) -> None:
        """Each one's mass on the other's K most likely tokens, for a few targets spread over a microbatch."""
        rows = self._rows_of(len(student_CV))
        if len(rows) == 0:
            return
        k = min(self.overlap_k, student_CV.shape[-1])
        s, t = student_CV[rows].detach().softmax(-1), teacher_CV[rows].detach().softmax(-1)
        s_top, t_top = s.topk(k, -1).indices, t.topk(k, -1).indices
        shared = (s_top.unsqueeze(-1) == t_top.unsqueeze(-2)).any(-1)
        self._add_overlap(s.gather(-1, t_top).sum(), t.gather(-1, s_top).sum(), shared.sum() / k, len(rows))

    @torch.no_grad()
    def compare_top_k(self, student_CV: Tensor, ids_CK: Tensor, logprobs_CK: Tensor) -> None:
        """`compare` with a teacher of whom only the most likely tokens are known; absent entries are -inf. Where the
        student's tokens are not among them, the teacher's mass on those counts as 0."""
        is_known = (logprobs_CK > -torch.inf).any(-1).tolist()
        rows = [i for i in self._rows_of(len(student_CV)) if is_known[i]]
        if len(rows) == 0:
            return
        s, ids, p = student_CV[rows].detach().softmax(-1), ids_CK[rows], logprobs_CK[rows].detach().exp()
        k = min(self.overlap_k, ids.shape[-1])
        best, at = p.topk(k, -1)
        t_top, s_top = ids.gather(-1, at), s.topk(k, -1).indices
        shared = (t_top.unsqueeze(-1) == s_top.unsqueeze(-2)).any(-1) & (best > 0)
        on_student = (ids.unsqueeze(-1) == s_top.unsqueeze(-2)).any(-1) * p
        self._add_overlap(
            torch.where(best > 0, s.gather(-1, t_top), 0.0).sum(), on_student.sum(), shared.sum() / k, len(rows)
        )

    def _rows_of(self, count: int) -> Sequence[int]:
        """Which of the microbatch's next `count` targets are compared: every so many-th."""
        if self.overlap_k == 0 or self._every == 0:
            return ()
        first = -self._num_seen % self._every
        self._num_seen += count
        return range(first, count, self._every)

    def _add_overlap(self, student: Tensor, teacher: Tensor, shared: Tensor, count: int) -> None:
        values = [student, teacher, shared, torch.tensor(float(count))]
        self._add("overlap", torch.stack([v.double().to(student.device) for v in values]))

    @torch.no_grad()
    def share(self, log_ratio_C: Tensor, weight_C: Tensor) -> None:
        """Of tokens that the student sampled: the mean of min(1, p_teacher / p_student) is the mass that both share.

        Args:
            log_ratio_C: log p_teacher - log p_student of each token.
            weight_C: what each token counts for: the correction of the sampler to the student.
        """
        shared_C = weight_C.double() * log_ratio_C.detach().double().clamp_max(0).exp()
        self._add("mass", torch.stack([shared_C.sum(), weight_C.double().sum()]))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take_sums(self) -> dict[str, float]:
        """Everything since the last call, flat, so that processes can add theirs."""
        out = {f"{name}/{i}": v for name, sums in self._sums.items() for i, v in enumerate(sums.tolist())}
        self._sums = {}
        return out

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means, by name; groups without targets are left out."""
        out: dict[str, float] = {}
        labels = [f"targets_{a}_to_{b - 1}" for a, b in zip((0, *EDGES), EDGES, strict=False)]
        labels.append(f"targets_from_{EDGES[-1]}")
        for what, names in (("position", labels), ("teacher", list(self.names))):
            for i, name in enumerate(names):
                n = sums.get(f"{what}_targets/{i}", 0.0)
                if n > 0 and (what == "position" or len(self.names) > 1):
                    out[f"distill/divergence_nats_per_target/{name}"] = sums[f"{what}_nats/{i}"] / n
        total = sum(v for name, v in sums.items() if name.startswith("teacher_targets/"))
        if total > 0:
            nats = sum(v for name, v in sums.items() if name.startswith("teacher_nats/"))
            out["distill/divergence_nats_per_target"] = nats / total
        n = sums.get("overlap/3", 0.0)
        if n > 0:
            out |= {
                f"distill/student_mass_on_teacher_top{self.overlap_k}": sums["overlap/0"] / n,
                f"distill/teacher_mass_on_student_top{self.overlap_k}": sums["overlap/1"] / n,
                f"distill/frac_top{self.overlap_k}_shared": sums["overlap/2"] / n,
            }
        if (n := sums.get("mass/1", 0.0)) > 0:
            out["distill/mass_shared"] = sums["mass/0"] / n
        return out
