"""The cards of the policy-gradient methods."""

from tutelage.methods.card import Card

_COMMON = dict(
    source="Judged(Drawn(student, n), verifier), refilled where asked",
    eats="Prompts of mixed difficulty for this model, and a verifier.",
    policy="on: every draw is the current policy's",
)
_WHEN = "After graduation: imitation is flat, pass@k is well above pass@1, and groups have both outcomes."

CARDS = {
    card.name: card
    for card in (
        Card(
            name="reinforce",
            title="Reinforce",
            what="Push every sampled token up by its completion's reward, 1 or -1.",
            signal='PolicyGradient("reinforce")',
            when="As the baseline that the others are compared with.",
            gotcha="Groups that are all wrong push everything down and the KL explodes: use reinforce_rej.",
            cite=("Williams 1992", "Xiong et al. 2025, arXiv:2504.11343"),
            **_COMMON,
        ),
        Card(
            name="reinforce_rej",
            title="Reinforce-Rej",
            what="Reinforce on groups with both outcomes; all-right and all-wrong groups teach nothing.",
            signal='PolicyGradient("reinforce_rej")',
            when=_WHEN,
            gotcha="Dropping all-wrong groups buys reward and KL, dropping all-right ones keeps entropy.",
            cite=("Xiong et al. 2025, arXiv:2504.11343",),
            **_COMMON,
        ),
        Card(
            name="rloo",
            title="RLOO",
            what="Each completion's reward less the mean of the others of its prompt.",
            signal='PolicyGradient("rloo")',
            when=_WHEN,
            gotcha="The gradient is unbiased only without a clip and with normalise=sequences.",
            cite=("Ahmadian et al. 2024, arXiv:2402.14740",),
            **_COMMON,
        ),
        Card(
            name="grpo",
            title="GRPO",
            what="Each completion's reward less its group's mean, over its group's standard deviation, ratios clipped.",
            signal='PolicyGradient("grpo")',
            when=_WHEN,
            gotcha="Dividing by the std weighs nearly solved and nearly hopeless prompts up: is_std_normalised=false.",
            cite=("Shao et al. 2024, arXiv:2402.03300", "Liu et al. 2025, arXiv:2503.20783", "arXiv:2503.14476"),
            **_COMMON,
        ),
        Card(
            name="raft_pp",
            title="RAFT++",
            what="The likelihood of the best of each group, importance-weighted and clipped.",
            signal='PolicyGradient("raft")',
            when="Rejection sampling with several updates a draw.",
            gotcha="Positives only: entropy collapses by step 100 where GRPO's lasts. clip=[0.2, 0.28] delays it.",
            cite=("Xiong et al. 2025, arXiv:2504.11343",),
            **_COMMON,
        ),
    )
}
