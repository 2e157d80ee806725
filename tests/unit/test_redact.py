"""What a run writes about itself holds no token, key or password."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.redact import REDACTED, redacted, redacted_text, redacted_words

pytestmark = pytest.mark.fast

SECRET = "s3cr3tValue0123456789"


@pytest.mark.parametrize(
    "value",
    [
        {"token": SECRET},
        {"HF_TOKEN": SECRET},
        {"hfToken": SECRET},
        {"wandb": {"api_key": SECRET}},
        {"comet": {"apikey": SECRET}},
        {"aws_secret_access_key": SECRET},
        {"password": int("1234567890123")},
        {"credentials": {"user": "me", "value": SECRET}},
        {"secrets": [SECRET]},
        {"path": f"https://user:{SECRET}@host/data"},
        {"path": f"https://{SECRET}@host/data"},
        {"path": f"s3://bucket/x?X-Amz-Signature={SECRET}&a=1"},
        {"path": f"https://host/x?token={SECRET}&a=1"},
        {"setup": f"module load cuda\nexport HF_TOKEN={SECRET}\nexport A=1"},
        {"setup": f"export WANDB_API_KEY='{SECRET}'"},
        {"setup": f'curl -H "Authorization: Bearer {SECRET}"'},
        {"setup": [f"export HF_TOKEN={SECRET}", f"curl -H 'authorization: basic {SECRET}'"]},
        {"command": ["trainer", "--token", SECRET]},
        {"command": ["trainer", f"--hf-token={SECRET}"]},
        {"model": {"path": "hf_" + SECRET}},
        {"deep": [[{"a": ({"password": SECRET},)}]]},
    ],
)
def test_secrets_go(value: dict[str, Any]) -> None:
    text = json.dumps(redacted(value))
    assert SECRET not in text
    assert "1234567890123" not in text
    assert REDACTED in text


@pytest.mark.parametrize(
    "value",
    [
        tiny.recipe(),
        {"run": {"tokens": 5e9}},
        {
            "bos_token_id": 1,
            "eos_token": "</s>",
            "pad_token": "[PAD]",
            "image_token": "<image>",
            "eos_token_id": [2, 3],
        },
        {"tokenizer": {"path": "owner/name", "revision": None}, "tokens_per_second": 1.5, "token": None},
        {"command": ["trainer", "train", "a.yaml", "run.tokens=5e9", "tokenizer.path=runs/x@y"]},
        {"path": "/data/Basic Training/a@b/c", "url": "https://host/a@b"},
        {"setup": "source /env/bin/activate; export OMP_NUM_THREADS=4"},
        {"key": "value", "monkey": "x", "num_key_value_heads": 2, "use_auth": True},
    ],
)
def test_the_rest_stays(value: dict[str, Any]) -> None:
    assert redacted(value) == value


def test_words_around_a_secret_stay() -> None:
    assert redacted_text(f"https://me:{SECRET}@host:80/a") == f"https://{REDACTED}@host:80/a"
    assert redacted_text(f"export HF_TOKEN={SECRET}; run") == f"export HF_TOKEN={REDACTED}; run"
    assert redacted_words(["x", "--token", SECRET, "y"]) == ["x", "--token", REDACTED, "y"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["token", "password"]), inner),
)


@given(st.dictionaries(st.text(), _JSON))
def test_twice_is_once(value: dict[str, Any]) -> None:
    once = redacted(value)
    assert redacted(once) == once
