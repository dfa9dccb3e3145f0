"""What is told of which event, and what is taken for a webhook: without a daemon."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon import logs
from finetuned_daemon.events import build
from finetuned_daemon.notify import kinds
from finetuned_daemon.notify.causes import cause_of, is_candidate
from finetuned_daemon.notify.channel import NotDelivered
from finetuned_daemon.notify.desktop import program
from finetuned_daemon.notify.kinds import KINDS
from finetuned_daemon.notify.message import of_run
from finetuned_daemon.notify.settings import add_options, settings
from finetuned_daemon.notify.webhook import (
    BadWebhook,
    new_secret,
    parse_secrets,
    parse_url,
    sign,
)
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    EndReason,
    Notice,
    PhaseChange,
    Progress,
    RunPhase,
    TrainingType,
)
from finetuned_daemon.tasks import ENDS, PauseReason, Run, Task, TaskState

TASK = Task(
    key=1,
    task_id="sft-0123456789",
    display_name="short answers",
    training_type=TrainingType.SFT,
    parameters=Parameters(),
)
RUN = Run(
    task_key=1,
    number=3,
    device="cpu",
    parameters=Parameters(),
    start_time=1_000_000,
    end_time=91_500_000,
    progress=Progress(step=7, total_steps=9, loss=1.5),
)


def ended(reason: EndReason, message: str = "", **fields: Any) -> tuple[Any, Run]:
    """A run that has ended so, and the event of it."""
    state = ENDS[reason].state
    event = build.state_change(
        91_500_000, 3, TaskState.RUNNING, state, end_reason=reason, message=message
    )
    return event, replace(RUN, state=state, end_reason=reason, **fields)


def kind_of(event: Any, run: Run) -> str | None:
    if not is_candidate(event):
        return None
    cause = cause_of(event, run)
    return cause.kind.name if cause else None


@pytest.mark.parametrize("reason", EndReason)
def test_every_end_of_a_run_is_of_a_kind(reason: EndReason) -> None:
    """Whatever comes to the table of ends: somebody can be told of it."""
    expected = {
        TaskState.COMPLETED: "completed",
        TaskState.FAILED: "failed",
        TaskState.STOPPED: "quota_used_up" if reason is EndReason.QUOTA_USED_UP else "stopped",
    }
    assert kind_of(*ended(reason)) == expected[ENDS[reason].state]


@pytest.mark.parametrize("reason", EndReason)
def test_of_a_probe_only_a_failure_is_told(reason: EndReason) -> None:
    failed = ENDS[reason].state is TaskState.FAILED
    assert kind_of(*ended(reason, is_probe=True)) == ("failed" if failed else None)


@pytest.mark.parametrize(
    ("reason", "kind"), [(PauseReason.DISK_FULL, "paused"), (PauseReason.REQUESTED, None)]
)
def test_a_pause_is_told_where_nobody_asked_for_it(reason: PauseReason, kind: str | None) -> None:
    event = build.state_change(1, 3, TaskState.RUNNING, TaskState.PAUSED)
    assert kind_of(event, replace(RUN, state=TaskState.PAUSED, pause=reason)) == kind


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (Notice(reason="RUNNER_SILENT", message="m"), "needs_attention"),
        (Notice(reason="RESUME_REFUSED", message="m"), "needs_attention"),
        (PhaseChange(phase=RunPhase.WAITING_FOR_SPACE, message="m"), "needs_attention"),
        (Notice(reason="RUNNER_BACK", message="m"), None),
        (PhaseChange(phase=RunPhase.TRAINING), None),
        (Progress(step=1), None),
    ],
)
def test_what_needs_somebody_is_told_and_what_does_not_is_not(payload: Any, kind: Any) -> None:
    assert kind_of(build.reported(1, 3, payload), RUN) == kind


def test_a_retry_by_itself_is_no_end() -> None:
    event = build.state_change(1, 4, TaskState.RUNNING, TaskState.QUEUED)
    assert not is_candidate(event)


def test_a_notification_says_what_happened_and_what_to_type() -> None:
    event, run = ended(EndReason.DATASET_INVALID, "Line 7 is no chat.")
    cause = cause_of(event, run)
    assert cause is not None
    made = of_run(cause, 91_500_000, TASK, run, state="FAILED", output_path="", language="en")
    content = json.loads(made.body)
    assert content["id"] == made.id
    assert content["type"] == "run.failed"
    assert content["timestamp"] == "1970-01-01T00:01:31.500Z"
    data = content["data"]
    assert data.pop("host")
    assert data == {
        "title": "short answers (3): failed",
        "sentence": "Line 7 is no chat.",
        "task": "tasks/sft-0123456789",
        "display_name": "short answers",
        "training_type": "SFT",
        "run": 3,
        "is_probe": False,
        "state": "FAILED",
        "reason": "DATASET_INVALID",
        "next": "finetunectl task fix sft-0123456789",
        "output_path": None,
        "last_checkpoint": None,
        "step": 7,
        "total_steps": 9,
        "loss": 1.5,
        "start_time": "1970-01-01T00:00:01.000Z",
        "duration_seconds": 90.5,
    }


def test_in_chinese_title_and_sentence_are_chinese_and_what_is_known_stays() -> None:
    event, run = ended(EndReason.DATASET_INVALID, "Line 7 is no chat.")
    cause = cause_of(event, run)
    assert cause is not None
    data = of_run(cause, 1, TASK, run, state="FAILED", output_path="", language="zh").data
    assert data["title"] == "short answers (3): 失败"
    assert data["sentence"] == "数据无法使用。Line 7 is no chat."


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_in_both_languages(kind: kinds.Kind) -> None:
    assert kind.label.en
    assert any("\u4e00" <= c <= "\u9fff" for c in kind.label.zh)


def test_a_sentence_has_no_secret_no_control_character_and_an_end() -> None:
    message = f"\x1b[31m hf_{'a' * 30} \0 {'long ' * 1000}"
    event, run = ended(EndReason.RUNNER_CRASHED, message)
    cause = cause_of(event, run)
    assert cause is not None
    sentence = of_run(cause, 1, TASK, run, state="FAILED", output_path="", language="en").data[
        "sentence"
    ]
    assert "aaaa" not in sentence
    assert sentence.isprintable()
    assert len(sentence) == 1000


def test_a_loss_that_is_no_number_is_left_out() -> None:
    """JSON has none, and a receiver would refuse the whole."""
    event, run = ended(EndReason.LOSS_NOT_FINITE)
    run = replace(run, progress=Progress.model_construct(step=1, total_steps=9, loss=math.nan))
    cause = cause_of(event, run)
    assert cause is not None
    made = of_run(cause, 1, TASK, run, state="FAILED", output_path="", language="en")
    assert made.data["loss"] is None


def test_a_signature_is_what_the_standard_says() -> None:
    """With the example that libraries of Standard Webhooks are tested by."""
    (secret,) = parse_secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_new_secret_can_be_used_and_several_lines_are_several() -> None:
    text = f"{new_secret(bytes(32))}\n\n{new_secret(bytes(64))}\n"
    assert parse_secrets(text) == (bytes(32), bytes(64))


@pytest.mark.parametrize(
    "text", ["", "\n", "secret", "whsec_", "whsec_AAAA", "whsec_%%%%", "MfKQ9r8GKYqrTwjUPD8ILPZI"]
)
def test_a_secret_that_others_could_not_verify_is_refused(text: str) -> None:
    with pytest.raises(BadWebhook, match="finetuned notify new-secret"):
        parse_secrets(text)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://",
        "ftp://host/path",
        "file:///etc/passwd",
        "host/path",
        "https://host:port/",
        "https://ho st/",
        "https://host/a\nb",
        "https://[::1/",
        "http://192.168.0.7/hook",
        "http://127.0.0.1.example.com/hook",
    ],
)
def test_an_address_that_can_not_be_used_is_refused(url: str) -> None:
    with pytest.raises(BadWebhook):
        parse_url(url, may_be_http=False)


@pytest.mark.parametrize(
    ("url", "label", "path"),
    [
        (
            "https://hooks.example.com/T0/secret?key=1",
            "https://hooks.example.com",
            "/T0/secret?key=1",
        ),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "/"),
        ("http://[::1]:8080/a", "http://[::1]:8080", "/a"),
        ("http://localhost/a#part", "http://localhost", "/a"),
        ("https://user:pa%3Ass@host/ä", "https://host", "/%C3%A4"),
    ],
)
def test_what_is_shown_of_an_address_is_its_host(url: str, label: str, path: str) -> None:
    """Path, query and password are often secrets."""
    target = parse_url(url, may_be_http=False)
    assert (target.label, target.path) == (label, path)


def test_a_user_in_an_address_is_for_basic_authentication() -> None:
    assert parse_url("https://user:pa%3Ass@host/", may_be_http=False).user == "user:pa:ss"
    assert parse_url("https://host/", may_be_http=False).user == ""


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("https://h/services/T01234567/B0-abcdef/x", ["T01234567", "B0-abcdef"]),
        ("https://h/hook?room=9&key=letmein-please", ["letmein-please"]),
        (
            "https://h/hook?key=let%20me%20in%20please",
            ["let%20me%20in%20please", "let me in please"],
        ),
        ("https://me:pass%2Fword-1@h/", ["pass%2Fword-1", "pass/word-1", "bWU6cGFzcy93b3JkLTE="]),
        ("https://token-of-mine@h/", ["token-of-mine", "dG9rZW4tb2YtbWluZTo="]),
        ("https://h/ä-secret-ä", ["ä-secret-ä", "%C3%A4-secret-%C3%A4"]),
    ],
)
def test_no_piece_of_an_address_that_may_be_a_secret_is_told(
    url: str, secrets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is given nor what is sent; a word, such as `services`, stays as it is."""
    monkeypatch.setattr(logs, "_secrets", set[str]())
    parse_url(url, may_be_http=False)
    for secret in secrets:
        said = str(NotDelivered(f"finetuned services: {secret} notifications"))
        assert secret not in said
        assert said.startswith("finetuned services: [secret]")
        assert said.endswith("notifications")


@pytest.mark.parametrize("url", ["https://me:pass/word@host/", "https://me:pa℀ss@host/"])
def test_an_address_that_can_not_be_read_is_not_quoted(url: str) -> None:
    with pytest.raises(BadWebhook) as caught:
        parse_url(url, may_be_http=False)
    assert "pa" not in str(caught.value).replace("password", "")


def test_why_it_has_not_arrived_is_one_line_that_steers_no_terminal() -> None:
    assert str(NotDelivered("a\x1b]0;b\x07\r\nc \u202e")) == "a\\x1b]0;b\\x07 c \\u202e"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_a_title_that_begins_like_an_option_is_none(platform: str) -> None:
    found = program(platform, "-e", "/server:evil")
    assert found is not None
    argv, stdin = found
    if platform == "darwin":
        assert argv[-3:] == ["--", "-e", "/server:evil"]
    else:
        assert (argv, stdin) == (["msg", "*"], b"-e\n/server:evil")


def given(*options: str) -> Any:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return settings(parser, parser.parse_args(options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--notify-command", ""), "--notify-command is empty"),
        (("--notify-command", "'open"), "can't be split"),
        (("--notify-command", "no-such-program -x"), "there is no program no-such-program"),
        (("--notify-webhook", "http://example.com/"), "--notify-allow-http"),
        (("--notify-webhook", "@/no/such/file"), "No such file"),
        (("--notify-webhook", "@/dev/null"), "no regular file"),
        (("--notify-webhook", "@/"), "no regular file"),
        (("--notify-webhook", "@"), "the file with the address must follow @"),
        (("--notify-webhook", "https://host:port/"), "its port must be a number"),
        (("--notify-webhook-secret-file", "/dev/null"), "is for --notify-webhook"),
        (("--notify-on", "completed,nonsense"), "not nonsense"),
        (("--notify-on", ","), "not nothing"),
        (("--notify-retry-seconds", "0"), "above 0"),
        (("--notify-timeout-seconds", "nan"), "above 0"),
    ],
)
def test_a_wrong_option_is_named(
    options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        given(*options)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_files_with_secrets_must_be_their_users_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret, url = tmp_path / "secret", tmp_path / "url"
    secret.write_text(new_secret(bytes(32)))
    url.write_text("https://example.com/hook-of-somebody\n")
    options = ("--notify-webhook", f"@{url}", "--notify-webhook-secret-file", str(secret))
    for path in (url, secret):
        path.chmod(0o600)
    for path in (url, secret):
        path.chmod(0o644)
        with pytest.raises(SystemExit):
            given(*options)
        assert f"chmod 600 {path}" in capsys.readouterr().err
        path.chmod(0o600)
    found = given(*options)
    assert found.secrets == (bytes(32),)
    assert found.webhooks[0].path == "/hook-of-somebody"
    assert "AAAA" not in repr(found)


def test_by_default_the_users_own_stop_is_not_told() -> None:
    names = {kind.name for kind in KINDS}
    assert given().kinds == names - {"stopped"}
    assert given("--notify-on", "stopped,needs-attention").kinds == {"stopped", "needs_attention"}
