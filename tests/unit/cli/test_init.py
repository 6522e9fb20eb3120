"""A begun project: its configuration is legal, its schema knows every option and takes every example, and the commands that
`init --text` prints, typed as they stand, lead from any plain text to a model that answers."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_samoe.cli.command import module_of
from megatron_samoe.cli.init import LEAST_BYTES, examples, main
from megatron_samoe.cli.quickstart import NOVELS
from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.schema import json_schema
from megatron_samoe.config.validate import validate
from megatron_samoe.evaluation.study.definition import read_study
from tests.harness.pairs import first_by_day
from tests.harness.program import ProgramRun, start
from tests.harness.serving import Client, texts

ROOT = Path(__file__).parents[3]
WITHOUT_CORPUS = "--mock-data --data-path --tokenizer-type ByteTokenizer --tokenizer-model None".split()
jsonschema = pytest.importorskip("jsonschema", reason="schemas are checked by jsonschema")


def begun(config: Path) -> PretrainConfig:
    """Returns a begun project's configuration, without a corpus."""
    return parse_pretrain_args(["--config", str(config), "--run-dir", "r", *WITHOUT_CORPUS])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    assert main([str(tmp_path / "first")]) == 0
    return tmp_path / "first"


def test_the_configuration_is_legal_and_names_its_schema(project: Path) -> None:
    text = (project / "config.yaml").read_text()
    config = begun(project / "config.yaml")
    validate(config, 1)
    assert config.moe.expert_layout == "moe" and config.training.global_batch_size == 32
    assert config.logging.moe_per_layer_logging
    assert text.startswith("# yaml-language-server: $schema=schema.json")
    assert f"\n  # moe_router_topk: {PretrainConfig().moe.moe_router_topk}\n" in text, (
        "what is commented out is the default"
    )


@pytest.mark.parametrize("layout", ["samoe", "dense"])
def test_a_configuration_for_each_other_kind_of_model(tmp_path: Path, layout: str) -> None:
    assert main([str(tmp_path / "new"), "--expert-layout", layout]) == 0
    config = begun(tmp_path / "new/config.yaml")
    validate(config, 1)
    assert config.moe.expert_layout == layout
    assert config.logging.moe_per_layer_logging == (layout != "dense"), "what a report shows of experts is measured"


@pytest.mark.parametrize("size", [None, LEAST_BYTES, 2_000_000])
def test_the_commands_in_files_fit_their_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if size is not None:
        Path("text.txt").write_text("It was a day. \n" * (size // 15 + 1))
    assert main(["new", *([] if size is None else ["--text", "text.txt"])]) == 0
    monkeypatch.chdir("new")
    found = []
    for name in ("config.yaml", "pretrain.slurm"):
        text = Path(name).read_text()
        nodes, each = (
            int((re.findall(p, text) or [1])[0]) for p in (r"--nodes=(\d+)", r"(?:gpus-per|nproc-per)-node[= ](\d+)")
        )
        for words in re.findall(r"-m megatron_samoe pretrain (.*)", text):
            config = parse_pretrain_args([*shlex.split(words.replace('"$@"', "")), *WITHOUT_CORPUS])
            validate(config, nodes * each)
            found.append(nodes * each)
    assert found == [2, 16]
    samples = config.training.eval_iters * config.training.global_batch_size
    assert size is None or samples * config.model.seq_length * 4 <= max(size // 20, 16 * 128 * 4)


def test_every_example_can_be_begun_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"gpt_350m_samoe128", "study", "shared_pool", "routing"} <= set(examples())
    for name, path in examples().items():
        assert main([str(tmp_path / name), "--example", name]) == 0
        if path.parent.name == "studies":
            study = read_study(tmp_path / name / "studies" / path.name)
            assert study.variants == read_study(path).variants
            assert study.config.resolve().is_relative_to(tmp_path / name)
            assert study.config.read_text() == read_study(path).config.read_text()
        else:
            made = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
            assert made == yaml.safe_load(path.read_text())
    capsys.readouterr()
    assert main([str(tmp_path / "none"), "--example", "shared_pol"]) != 0
    said = capsys.readouterr().err
    assert "Did you mean 'shared_pool'? There are" in said and not (tmp_path / "none").exists()
    assert main([str(tmp_path / "none"), "--example", "study", "--expert-layout", "dense"]) != 0


def test_the_schema_takes_its_project_and_all_examples(project: Path) -> None:
    schema = json.loads((project / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for path in (project / "config.yaml", *sorted((ROOT / "examples/configs").glob("*.yaml"))):
        check.validate(yaml.safe_load(path.read_text()))
    for right in ({"optimizer": "muon"}, {"optimizer": {"optimizer": "muon"}}, {"optimizer": None}):
        check.validate(right)
    for wrong in ("num_layer: 3", "model: {num_layers: many}", "moe: {expert_layout: sparse}", "optimizer: mu"):
        assert not check.is_valid(yaml.safe_load(wrong)), wrong


def test_the_schema_has_every_option_with_a_description() -> None:
    schema = json_schema()
    for group in dataclasses.fields(PretrainConfig):
        for option in dataclasses.fields(getattr(PretrainConfig(), group.name)):
            entry = schema["properties"][group.name]["properties"][option.name]
            assert entry["description"] and ("type" in entry or "anyOf" in entry or "enum" in entry), option.name


def test_the_script_is_bash_and_nothing_is_replaced(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["bash", "-n", str(project / "pretrain.slurm")], check=True)
    assert "--job-name=first" in (project / "pretrain.slurm").read_text()
    assert main([str(project)]) != 0
    assert "is there already" in capsys.readouterr().err


#: The run is as long and the model as deep as a test can wait for; all else is as the project has it.
SHORT = ["--train-iters", "3", "--num-layers", "2", "--eval-iters", "1"]


def ask(server: ProgramRun, prompt: str) -> str:
    def address() -> re.Match[str] | None:
        return re.search(r"serving first at http://([\d.]+):(\d+)", server.output())

    assert server.wait_until(lambda: address() is not None), server.output()
    return texts(Client(address()[1], int(address()[2])).complete(prompt, max_tokens=4))[0]


@pytest.mark.parametrize("between", first_by_day(["\n", " "]), ids=["a novel", "a text of one line"])
def test_from_a_text_to_a_served_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text(between.join(NOVELS.read_text(encoding="utf-8")[:150_000].splitlines()))
    assert main(["first", "--text", "my text.txt"]) == 0
    _, _, printed = capsys.readouterr().out.partition("\n\ncd first\n")
    in_config = re.findall(r"^#   (.*)", Path("first/config.yaml").read_text(), re.MULTILINE)
    assert in_config == printed.splitlines()
    (several,) = re.findall(r"^# On two ranks: (.*)", Path("first/config.yaml").read_text(), re.MULTILINE)
    commands = [shlex.split(line)[1:] for line in printed.replace("\\\n", "").splitlines()]
    assert [words[0] for words in commands] == ["train-tokenizer", "preprocess", "pretrain", "generate", "serve"]
    said = {}
    for name, *words in commands:
        words += {"pretrain": SHORT, "serve": ["--port", "0"], "generate": ["--max-new-tokens", "4"]}.get(name, [])
        run = start(words, tmp_path / name, cwd=tmp_path / "first", program=module_of(name))
        if name == "serve":
            try:
                assert ask(run, "It was")
            finally:
                run.signal(signal.SIGTERM)
        said[name] = run.succeed(120)
    words = shlex.split(several.partition(" pretrain ")[2]) + SHORT + ["--train-iters", "4"]
    start(words, tmp_path / "several", num_ranks=2, cwd=tmp_path / "first").succeed(120)
    assert "--split" not in said["preprocess"], "there are documents enough"
    assert "validation loss at iteration 3" in said["pretrain"] and said["generate"].strip()


def test_a_text_that_is_missing_or_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, reason in (("", "has 0 bytes"), (None, "--text '"), (None, "matches no file")):
        if text is not None:
            (tmp_path / "text.txt").write_text(text)
        assert main([str(tmp_path / "new"), "--text", str(tmp_path / "text.txt")]) != 0
        assert reason in capsys.readouterr().err and not (tmp_path / "new").exists()
        (tmp_path / "text.txt").unlink(missing_ok=True)
