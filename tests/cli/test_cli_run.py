"""`llmc run`: prompts in all forms, answers on stdout, timings on stderr."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from toy_artifact import SlowExecutor, install_fake_executor, write_artifact

from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import SamplingParams


def direct(artifact: Path, prompt: str | list[int], **params: object):
    greedy = {"temperature": 0.0, "max_tokens": 16}
    return Engine(artifact).generate([prompt], SamplingParams(**{**greedy, **params}))[0]


def test_a_prompt_goes_through_the_chat_template(llmc, artifact: Path) -> None:
    code, out, err = llmc("run", artifact, "-p", "hello", "-n", 16)
    expected = direct(artifact, "user: hello\nassistant:")
    assert code == 0
    assert out == expected.text + "\n"
    num_prompt_tokens = len(expected.prompt_token_ids)
    assert re.fullmatch(
        rf"\[{num_prompt_tokens} prompt tokens, 16 generated; first token after \d+ ms, "
        r"then [\d.]+ tokens/s\]\n",
        err,
    )


def test_raw_prompts_and_artifacts_without_a_template_go_as_they_are(
    llmc, artifact: Path, tmp_path: Path
) -> None:
    expected = direct(artifact, "hello").text + "\n"
    assert llmc("run", artifact, "-p", "hello", "--raw", "-n", 16)[1] == expected
    write_artifact(tmp_path / "plain", template=False)
    assert llmc("run", tmp_path / "plain", "-p", "hello", "-n", 16)[1] == expected


def test_a_prompt_may_come_from_stdin(llmc, artifact: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    code, out, _ = llmc("run", artifact, "-p", "-", "--raw", "-n", 16)
    assert (code, out) == (0, direct(artifact, "hello").text + "\n")


def test_a_model_without_a_tokenizer_takes_and_gives_ids(llmc, tmp_path: Path) -> None:
    write_artifact(tmp_path / "bare", tokenizer=False, template=False)
    code, out, _ = llmc("run", tmp_path / "bare", "--ids", "5, 9,33", "-n", 16)
    assert code == 0
    assert [int(part) for part in out.split(",")] == direct(tmp_path / "bare", [5, 9, 33]).token_ids
    code, _, err = llmc("run", tmp_path / "bare", "-p", "hello")
    assert code == 2
    assert "hint: give token ids: --ids 1,2,3" in err


def test_sampling_options_reach_the_engine(llmc, artifact: Path) -> None:
    options = ["--temperature", "1.3", "--seed", "7", "--top-k", "40", "--top-p", "0.9"]
    expected = direct(artifact, "hello", temperature=1.3, seed=7, top_k=40, top_p=0.9)
    code, out, _ = llmc("run", artifact, "-p", "hello", "--raw", "-n", 16, *options)
    assert (code, out) == (0, expected.text + "\n")
    whole = direct(artifact, "hello").text
    stop = whole[8:10]
    out = llmc("run", artifact, "-p", "hello", "--raw", "-n", 16, "--stop", stop)[1]
    assert out == whole[: whole.index(stop)] + "\n"


def test_json_is_the_whole_answer_with_its_timings(llmc, artifact: Path) -> None:
    code, out, err = llmc("run", artifact, "-p", "hello", "--raw", "-n", 16, "--json")
    report = json.loads(out)
    expected = direct(artifact, "hello")
    assert (code, err) == (0, "")
    assert report["model"] == "toy"
    assert report["text"] == expected.text
    assert report["token_ids"] == expected.token_ids
    assert report["finish_reason"] == "length"
    assert report["num_prompt_tokens"] == len(expected.prompt_token_ids)
    assert report["num_generated_tokens"] == 16
    assert 0 < report["seconds_to_first_token"] < report["seconds"]
    decode_s = report["seconds"] - report["seconds_to_first_token"]
    assert report["tokens_per_second"] == pytest.approx(15 / decode_s)


def test_json_has_no_text_without_a_tokenizer_and_no_speed_of_one_token(
    llmc, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "bare", tokenizer=False, template=False)
    report = json.loads(llmc("run", tmp_path / "bare", "--ids", "5,9", "-n", 1, "--json")[1])
    assert report["text"] is None
    assert report["token_ids"] == direct(tmp_path / "bare", [5, 9], max_tokens=1).token_ids
    assert report["tokens_per_second"] is None


def test_a_failing_device_gives_no_json(llmc, artifact: Path, monkeypatch) -> None:
    monkeypatch.setattr(SlowExecutor, "broken", True)
    code, out, err = llmc("run", artifact, "-p", "hello", "--json")
    assert (code, out) == (1, "")
    assert "error: the engine failed" in err


def test_the_model_s_own_sampling_holds_where_no_option_is_given(llmc, tmp_path: Path) -> None:
    stated = {"do_sample": True, "temperature": 5.0, "top_p": 0.9}
    write_artifact(tmp_path / "own", generation_config=json.dumps(stated))

    def run(*options: object) -> str:
        return llmc("run", tmp_path / "own", "-p", "hello", "-n", 16, "--seed", 3, *options)[1]

    prompt = "user: hello\nassistant:"
    own = direct(tmp_path / "own", prompt, temperature=5.0, top_p=0.9, seed=3).text
    greedy = direct(tmp_path / "own", prompt).text
    assert own != greedy
    assert run() == own + "\n"
    assert run("--temperature", 0) == greedy + "\n"
    wide = direct(tmp_path / "own", prompt, temperature=5.0, top_p=1.0, seed=3).text
    assert wide != own
    assert run("--top-p", 1) == wide + "\n"


def test_a_bad_sampling_default_is_a_damaged_artifact(llmc, tmp_path: Path) -> None:
    write_artifact(tmp_path / "bad", generation_config='{"do_sample": true, "top_p": 7}')
    code, out, err = llmc("run", tmp_path / "bad", "-p", "hello")
    assert (code, out) == (6, "")
    assert "generation_config.json: top_p: got '7'" in err
    assert err.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "-p or by --ids"),
        (["-p", "a", "--ids", "1"], "-p or by --ids"),
        (["--ids", "1,x"], "'1,x'"),
        (["-p", "a", "--temperature", "-1"], "--temperature"),
        (["-p", "a", "--temperature", "nan"], "--temperature"),
        (["-p", "a", "--top-p", "2"], "--top-p"),
        (["-p", "a", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_wrong_options_are_named(llmc, artifact: Path, arguments, named: str) -> None:
    code, out, err = llmc("run", artifact, *arguments)
    assert (code, out) == (2, "")
    assert named in err


def test_a_prompt_the_model_cannot_take_is_exit_code_9(llmc, artifact: Path) -> None:
    assert llmc("run", artifact, "--ids", "99999")[0] == 9
    assert llmc("run", artifact, "-p", "hello " * 1000)[0] == 9


def test_a_failing_device_is_an_error_and_no_short_answer(
    llmc, artifact: Path, monkeypatch
) -> None:
    monkeypatch.setattr(SlowExecutor, "broken", True)
    code, _, err = llmc("run", artifact, "-p", "hello")
    assert code == 1
    assert "error: the engine failed" in err


def test_a_damaged_artifact_is_not_run(llmc, artifact: Path) -> None:
    (artifact / "tokenizer.json").write_text("{}")
    code, out, err = llmc("run", artifact, "-p", "hello")
    assert (code, out) == (6, "")
    assert "SHA-256" in err


def test_a_model_cannot_act_on_the_terminal(monkeypatch) -> None:
    from llmc.cli.console import printable

    written = "red \x1b[31m, bell \x07, tab \t, newline \n, ünï 🎉"
    assert printable(written) == written  # a pipe gets the data as it is
    monkeypatch.setattr("sys.stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert printable(written) == "red \ufffd[31m, bell \ufffd, tab \t, newline \n, ünï 🎉"


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_executor(monkeypatch)
