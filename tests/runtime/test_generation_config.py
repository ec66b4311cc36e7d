"""The model's own sampling defaults: what they mean, and that a caller's parameters come first."""

from __future__ import annotations

import json

import pytest
from fake_model import FakeExecutor, make_manifest

from llmc.errors import ArtifactError
from llmc.runtime.engine import Engine
from llmc.runtime.generation_config import load_sampling_defaults
from llmc.runtime.sampling_params import SamplingParams


def load(folder, content):
    path = folder / "generation_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_sampling_defaults(path)


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
        ),
        ({"do_sample": True, "temperature": 0.6, "top_p": None}, {"temperature": 0.6}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": None, "top_k": 50}, {"temperature": 0.0}),
        ({"eos_token_id": 2, "max_length": 4096}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.05}, {"temperature": 0.0, "repetition_penalty": 1.05}),
    ],
)
def test_fields_mean_what_they_do_to_the_tool_that_wrote_them(tmp_path, stated, found):
    assert load(tmp_path, stated) == found


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature: got '-1', expected a number"),
        ({"do_sample": True, "temperature": "hot"}, "temperature: got 'hot'"),
        ({"do_sample": True, "top_p": 0}, "top_p: got '0'"),
        ({"do_sample": True, "top_k": 2.5}, r"top_k: got '2\.5', expected an integer"),
        ({"repetition_penalty": [1]}, "repetition_penalty"),
        ({"do_sample": "yes"}, "do_sample: got 'yes', expected true or false"),
        ('{"temperature": NaN}', "not JSON: NaN"),
        ('{"temperature": 1e999, "do_sample": true}', "temperature: got 'inf'"),
        ("[1]", "expected an object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
def test_a_bad_value_is_one_error_that_names_it(tmp_path, content, named):
    with pytest.raises(ArtifactError, match=named) as found:
        load(tmp_path, content)
    assert "generation_config.json" in found.value.message
    assert found.value.hint == "correct it in the model's folder and compile again"


def test_a_file_that_is_not_text_is_an_artifact_error(tmp_path):
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        load_sampling_defaults(tmp_path / "generation_config.json")


def make_engine(**defaults):
    manifest = make_manifest(stop_token_ids=())
    return Engine.from_parts(
        manifest, FakeExecutor(manifest, [64]), num_pages=[64], sampling_defaults=defaults
    )


def test_the_engine_s_defaults_are_the_model_s_and_what_is_given_goes_before():
    engine = make_engine(temperature=0.6, top_p=0.9)
    assert engine.default_sampling() == SamplingParams(temperature=0.6, top_p=0.9)
    assert engine.default_sampling(top_p=0.5, seed=1) == SamplingParams(
        temperature=0.6, top_p=0.5, seed=1
    )
    assert make_engine().default_sampling() == SamplingParams()


def test_answers_without_parameters_follow_the_model_and_those_with_follow_the_caller():
    """top_k = 1 is greedy at any temperature: defaults that can be told from sampling."""
    prompt = [3, 4, 5]
    [greedy] = make_engine().generate([prompt], SamplingParams(temperature=0))
    engine = make_engine(temperature=0.7, top_k=1)
    [alone] = engine.generate([prompt])
    assert alone.token_ids == greedy.token_ids
    assert [i for d in engine.stream(prompt) for i in d.token_ids] == greedy.token_ids
    engine.submit("a", prompt)
    submitted = []
    while engine.has_work():
        submitted += [i for delta in engine.step() for i in delta.token_ids]
    assert submitted == greedy.token_ids

    asked = SamplingParams(seed=7)
    [given] = engine.generate([prompt], asked)
    [plain] = make_engine().generate([prompt], asked)
    assert given.token_ids == plain.token_ids != greedy.token_ids
