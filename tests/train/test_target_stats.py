"""What is measured on the way: entropy and hits over trained targets, from the logits the loss sees."""

import pytest
import torch

from tutelage.numerics.logprobs import entropy
from tutelage.train.trainer import target_stats

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stats_are_sums_over_trained_targets(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_CV = torch.randn(6, 11, dtype=dtype) * 3
    logits_CV[:, :2] = -torch.inf  # a vocabulary cut by a logit transform
    logits_CV[4, 2:] = -torch.inf
    logits_CV[4, 7] = 1.0  # one possible token: no entropy
    ids_C = logits_CV.argmax(-1)
    ids_C[1] = 1  # impossible
    ids_C[2] = logits_CV[2].argsort()[-2]  # second most likely
    weight_C = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 1.0], dtype=dtype)
    given = logits_CV.clone()
    stats = target_stats(logits_CV, {"weight_C": weight_C, "target_ids_C": ids_C})
    own = weight_C != 0
    assert stats["targets"] == 5
    assert stats["correct"] == 3
    torch.testing.assert_close(stats["entropy"], entropy(given)[own].sum())
    torch.testing.assert_close(logits_CV, given, rtol=0, atol=0)  # the loss reads them next


def test_a_tie_for_the_most_likely_token_is_a_hit() -> None:
    logits_CV = torch.tensor([[0.0, 2.0, 2.0]])
    for target, hits in ((0, 0), (1, 1), (2, 1)):
        stats = target_stats(logits_CV, {"weight_C": torch.ones(1), "target_ids_C": torch.tensor([target])})
        assert stats["correct"] == hits
