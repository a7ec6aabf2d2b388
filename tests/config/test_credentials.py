"""Passwords of URLs in texts, configurations and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.test_project import REPOSITORY
from tests.tiny import tiny_config
from w1train.config.compose import load_config
from w1train.config.credentials import MASK, find_passwords, is_masked, mask_tree, mask_urls
from w1train.config.errors import ConfigurationError, Problem, UserError, show
from w1train.config.resume import check_resume
from w1train.config.schema import StageConfig
from w1train.config.serialization import config_differences, config_from_yaml, config_to_yaml, flatten

UPLOAD = "s3://user:hunter2@host/runs"

# Characters that may be unencoded in the user and the password of a URL (RFC 3986), and others that people write there nevertheless.
PASSWORD = st.text(st.characters(codec="utf-8", exclude_characters='"<>', exclude_categories=("Z", "C")), min_size=1, max_size=12)
NAME = st.text("abcXYZ019-_.", min_size=1, max_size=8)
USER = st.builds(lambda name, domain: f"{name}{domain}", NAME, st.sampled_from(["", "@corp.com"]))


@given(user=USER, password=PASSWORD, path=NAME, words=st.lists(NAME, max_size=3))
@example(user="u", password="pa@ss", path="p@1", words=[])
@example(user="u", password="1/2", path="p", words=[])
def test_an_encoded_password_is_masked_and_nothing_else(user, password, path, words):
    words = " ".join(words)
    encoded = quote(password, safe="!$&'()*+,;=")  # characters that the standard allows
    text = f"{words} (s3://{user}:{encoded}@host:80/{path}@2), {words}"
    expected = f"{words} (s3://{user}:{MASK}@host:80/{path}@2), {words}"
    assert mask_urls(text) == expected
    assert mask_urls(expected) == expected
    url = f"s3://{user}:{encoded}@host/"
    assert find_passwords(url) == {encoded, password} - {MASK}
    assert is_masked(mask_urls(url))


@given(
    user=USER,
    password=PASSWORD.filter(lambda password: not password[0].isdecimal() and password[0] not in "?#'" and password.count("/") < 2),
    path=NAME,
)
def test_a_password_that_nobody_encoded_is_masked_too(user, password, path):
    masked = mask_urls(f"s3://{user}:{password}@host/{path}")
    assert masked.startswith(f"s3://{user}:{MASK}@")
    # If a password has an @ and also / ? or #, a part of it after the @ may remain.
    if "@" not in password:
        assert masked == f"s3://{user}:{MASK}@host/{path}"


@pytest.mark.parametrize(
    "text",
    [
        "12:30@home, a:b@c, C:\\x@y",
        "s3://bucket/a:b@c",
        "http://host:8080/a@b",
        "http://[::1]:80/x@y",
        "http://host:8080?q=a@b",
        "http://host:/path/to@2",
        "http://host:80",
        "http://host:5173/@vite/client",
        "sftp://me@corp.com:22/x@2",
        "file:///data/a:b@c",
        "https://host/?postcode=1&compass=2&author=3",
        "sftp://user@host/path",
        "https://host/?max_tokens=5&keys=2&monkey=3&page=1",
        "https://wandb.ai/entity/project/runs/abc",
        "s3://",
        "://a:b",
    ],
)
def test_what_is_no_password_stays(text):
    assert mask_urls(text) == text
    assert find_passwords(text) == set()
    assert not is_masked(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://:secret@host", "redis://:***@host"),
        ("simplecache::https://u:p@host", "simplecache::https://u:***@host"),
        ("['s3://a:b@c', 's3://d:e@f']", "['s3://a:***@c', 's3://d:***@f']"),
        ("https://host/x?X-Amz-Signature=ab%2Fc&X-Amz-Date=1", "https://host/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://host/?a=1&access_token=t#top", "https://host/?a=1&access_token=***#top"),
        ("https://u:p@host/?sig=s;Key=k", "https://u:***@host/?sig=***;Key=***"),
        ("'https://host/?token=t'", "'https://host/?token=***'"),
        ('u="https://u:p@[::1]:8080/"', 'u="https://u:***@[::1]:8080/"'),
        ("s3://AKIA:ab/cd+e@bucket", "s3://AKIA:***@bucket"),
        ("file://me@corp.com:Pa55w0rd@h/x", "file://me@corp.com:***@h/x"),
        ("file://me@corp.com:Pa/55@h/x", "file://me@corp.com:***@h/x"),
        ("file://me@corp.com:p@ss@h/x@y", "file://me@corp.com:***@h/x@y"),
        ("file://u:p/s@s@h/x@y", "file://u:***@h/x@y"),
        ("s3:/u:PW@h", "s3:/u:***@h"),
        ("x://u:1234/5678@h", "x://u:***@h"),
        ("x://u:123456/b@h", "x://u:***@h"),
        ("s3://u:/abc+d@h", "s3://u:***@h"),
        ("https://host/?jwt=a&sas=b&private_key=c&passphrase=d", "https://host/?jwt=***&sas=***&private_key=***&passphrase=***"),
        ("s3://u%3APW@h", "s3://u%3A***@h"),
        ("s3://u%3aPW@h", "s3://u%3a***@h"),
        ("https://host/?pass=a&auth=b&code=c", "https://host/?pass=***&auth=***&code=***"),
        ("https://host/x#access_token=a", "https://host/x#access_token=***"),
        (f"https://u:{'p' * 5000}@host/{'x' * 5000}", f"https://u:***@host/{'x' * 5000}"),
        (r'{"a": "https://host/?key=abc\"\n"}', r'{"a": "https://host/?key=***\"\n"}'),
    ],
)
def test_the_forms_that_are_covered(text, expected):
    assert mask_urls(text) == expected
    assert is_masked(expected)


PIECE = st.sampled_from(["s3://", ":/", "u:", "u%3A", "p@", "h", "/", "?key=", "&a=", "#code=", "\\", '"', "'", "\n", "\u00e9", " ", "80"])


@given(texts=st.lists(st.lists(PIECE, max_size=12).map("".join), max_size=3))
@example(texts=['url = "https://a.b/?key=abc"\n'])
@example(texts=["s3://u:p\\"])
def test_json_stays_json(texts):
    assert len(json.loads(mask_urls(json.dumps(texts)))) == len(texts)


SEARCHES = """
from w1train.config.credentials import find_passwords
for piece in ("a", "://", "://:a", "://:a@", "://@%3A", ":/@", "?token", "://?token", "://u:1/"):
    find_passwords(("x://u:p@" if "://" in piece else "") + piece * ((1 << 20) // len(piece)))
"""


def test_a_search_takes_time_in_proportion_to_the_text():
    """All of these texts of 1 MiB take a second or two; they would take hours if the time grew quadratically."""
    subprocess.run([sys.executable, "-c", SEARCHES], check=True, timeout=60, cwd=REPOSITORY)


def test_a_configuration_is_written_without_passwords_and_keeps_them_in_memory():
    config = tiny_config(
        checkpoint={"upload": UPLOAD},
        data={"train": None, "blend": {"books": {"prefix": "s3://c:hunter2@d/books"}}, "cache_directory": "/cache"},
    )
    assert "hunter2" not in config_to_yaml(config)
    assert "hunter2" not in str(flatten(config))
    assert config.checkpoint.upload == UPLOAD
    stored = config_from_yaml(config_to_yaml(config))
    assert stored.checkpoint.upload == "s3://user:***@host/runs"
    assert stored.data.blend["books"].prefix == "s3://c:***@d/books"


def test_another_password_is_no_change_and_another_user_is_one():
    stored = config_from_yaml(config_to_yaml(tiny_config(training={"initial_weights": UPLOAD})))
    other = tiny_config(training={"initial_weights": UPLOAD.replace("hunter2", "other")})
    assert config_differences(stored, other) == []
    assert check_resume(stored, other, 10) == []
    other = tiny_config(training={"initial_weights": UPLOAD.replace("user", "other")})
    assert [problem.key for problem in check_resume(stored, other, 10)] == ["training.initial_weights"]
    assert "hunter2" not in str(check_resume(stored, other, 10)[0])


def test_a_stage_with_another_password_is_the_same_stage():
    def with_password(password: str):
        stage = StageConfig(tokens=1024, learning_rate=1e-3, train=f"s3://user:{password}@host/train")
        return tiny_config(schedule={"stages": {"only": stage}}, data={"cache_directory": "/cache"})

    assert check_resume(config_from_yaml(config_to_yaml(with_password("first"))), with_password("second"), 512) == []


def test_a_run_is_not_begun_with_a_masked_url():
    with pytest.raises(ConfigurationError) as caught:
        load_config(["recipe=demo", "checkpoint.upload='s3://user:***@host/runs'"])
    (problem,) = caught.value.problems
    assert problem.key == "checkpoint.upload"
    assert problem.suggestion == "export the URL, and give checkpoint.upload='${oc.env:VARIABLE}'"


def test_the_way_that_is_proposed_works(monkeypatch):
    monkeypatch.setenv("VARIABLE", UPLOAD)
    config = load_config(["recipe=demo", "checkpoint.upload=${oc.env:VARIABLE}"])
    assert config.checkpoint.upload == UPLOAD


def test_errors_show_no_password():
    assert (
        str(UserError(f"checkpoint.upload: {UPLOAD}: no such protocol")) == "checkpoint.upload: s3://user:***@host/runs: no such protocol"
    )
    problem = Problem(f"a={UPLOAD}", UPLOAD, "a path", f"--flag {UPLOAD}")
    assert "hunter2" not in f"{problem} {ConfigurationError([problem])}"


def test_a_shortened_value_does_not_end_inside_a_password():
    assert "hunter2" not in show(f"s3://user:{'hunter2' * 30}@host")
    assert "hunter2" not in show({"a": [f"s3://user:{'hunter2' * 30}@host"]})


def test_a_tree_keeps_what_is_no_text():
    tree = {"a": [1, None, {"b": UPLOAD}], "c": 2.5, "d": True}
    assert mask_tree(tree) == {"a": [1, None, {"b": "s3://user:***@host/runs"}], "c": 2.5, "d": True}
    assert tree["a"][2]["b"] == UPLOAD
