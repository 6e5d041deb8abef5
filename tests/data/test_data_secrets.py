"""Secrets: known credentials are flagged and masked; ordinary text is left alone."""

import base64
import time

import pytest
from data_samples import simple

from tutelage.data.secrets import find_secrets, guard, mask_secrets
from tutelage.data.store import TrajectoryStore, TrajectoryWriter
from tutelage.types import Status, Verdict

AWS = "AKIA" + "ABCDEFGHIJKLMNOP"  # put together here, so that no scanner takes this file for a leak
SECRETS = {
    "aws_access_key_id": AWS,
    "aws_secret_access_key": "aws_secret_access_key = " + "aB3/" * 10,
    "private_key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    "github_token": "ghp_" + "a1B2" * 9,
    "gitlab_token": "glpat-" + "x" * 20,
    "huggingface_token": "hf_" + "aB3x" * 9,
    "api_key": "sk-" + "proj-" + "aB3_" * 8,
    "stripe_key": "sk_" + "live_" + "4" * 24,
    "google_api_key": "AIza" + "b" * 35,
    "slack_token": "xoxb-" + "123456789012-abc",
    "npm_token": "npm_" + "a" * 36,
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.dozjgNryP4J3jVmN",
    "bearer_token": "Authorization: Bearer " + "ab12" * 6,
}


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
def test_known_credentials_are_found_and_masked(kind, secret):
    text = f"before {secret} after"
    assert find_secrets(text) == {kind: 1}
    masked = mask_secrets(text)
    assert f"[masked {kind}]" in masked and masked.startswith("before ") and masked.endswith(" after")
    assert find_secrets(masked) == {}


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 42, flag{this_is_not_a_token}.",
        "sk-short AKIA123 hf_x Bearer of news eyJ",
        "https://example.org/a/very/long/path?with=parameters&and=more#fragment",
        base64.b64encode(b"ordinary bytes " * 20).decode(),
        "risk-averse-strategies-for-everyone-in-the-room",
        "class='sk-toggleable__control--hidden-visually'",
        "if '-----BEGIN PRIVATE " + "KEY-----' in text: warn('do not commit keys, please read the manual')",
        "BAKIAABCDEFGHIJKLMNOPQ",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert (find_secrets(text), mask_secrets(text)) == ({}, text)


def test_a_key_that_is_cut_off_is_masked_to_the_end():
    assert mask_secrets("x -----BEGIN PRIVATE " + "KEY-----\nMIIE") == "x [masked private_key]"


def leaky():
    return simple(
        0,
        messages=(
            {"role": "tool", "content": f"env: {AWS} and {AWS}"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": f'{{"k": "{AWS}"}}'}}]},
        ),
        completion=f"it is {AWS}",
        verdict=Verdict(status=Status.ACCEPT, reason=f"saw {SECRETS['jwt']}", key=AWS),
        extra={"raw": {AWS: [SECRETS["npm_token"]]}},
    )


def test_flagging_changes_nothing_else():
    flagged = guard(leaky(), "flag")
    assert flagged.extra == {**leaky().extra, "secrets": {"aws_access_key_id": 4, "jwt": 1, "npm_token": 1}}
    assert (flagged.messages, flagged.spans, flagged.completion) == (
        leaky().messages,
        leaky().spans,
        leaky().completion,
    )
    assert guard(leaky(), "off") is not None and "secrets" not in guard(leaky(), "off").extra
    assert guard(simple(0), "flag") == simple(0)


def test_masking_leaves_no_trace_in_text_or_tokens(tmp_path):
    with TrajectoryWriter(tmp_path / "s", secrets="mask") as writer:
        writer.write_all([leaky(), simple(1)])
    masked, clean = TrajectoryStore(tmp_path / "s")
    assert clean == simple(1)
    assert (masked.spans, masked.marks, masked.num_targets) == ((), ("masked",), 0)
    assert find_secrets(repr(masked)) == {}
    assert masked.messages[1]["tool_calls"] == [{"function": {"arguments": '{"k": "[masked aws_access_key_id]"}'}}]
    assert masked.completion == "it is [masked aws_access_key_id]"
    assert masked.extra["secrets"]["aws_access_key_id"] == 4


def test_a_store_flags_unless_told_otherwise(tmp_path):
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(leaky())
    with TrajectoryWriter(tmp_path / "s", secrets="off") as writer:
        writer.write(leaky())
    flagged, off = TrajectoryStore(tmp_path / "s")
    assert ("secrets" in flagged.extra, off) == (True, leaky())


@pytest.mark.parametrize(
    "unit",
    [
        "eyJ" + "a" * 50 + " Bearer sk-AKIA -----BEGIN PRIVATE ",
        "-----BEGIN PRIVATE " + "KEY----- ",
        "eyJaaaaaaaaaaaa-",
        "sk-aaaaaaaaaaaa_",
        "hf_aaaaaaaaaaaaaaaa_",
        "bearer bearer\t",
        "secret_access_key=",
    ],
)
def test_long_text_is_searched_in_linear_time(unit):
    started = time.process_time()
    find_secrets(unit * (500_000 // len(unit)))
    assert time.process_time() - started < 3


def test_a_key_in_a_json_string_is_masked_whole():
    text = "-----BEGIN PRIVATE " + 'KEY-----\\nProc-Type: 4,X\\nMIIE\\n-----END PRIVATE KEY-----\\n", "next": 1'
    assert mask_secrets(text) == '[masked private_key]\\n", "next": 1'
