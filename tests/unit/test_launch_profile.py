"""Site profiles: where they are found, what wins over what, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.core.errors import RefusedError
from trainer.core.resources import resource_directory
from trainer.launch.profile import find_profile, profile_directories
from trainer.preflight.check import prepare
from trainer.preflight.data import write_tiny_shard

pytestmark = pytest.mark.fast


@pytest.fixture
def places(tmp_path):
    """An environment whose user and machine have directories of profiles of their own."""
    user, machine = (tmp_path / name / "trainer" / "profiles" for name in ("user", "machine"))
    for directory in (user, machine):
        directory.mkdir(parents=True)
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "user"), "XDG_CONFIG_DIRS": str(tmp_path / "machine")}
    return environment, user, machine


def test_shipped_examples_are_good(places):
    environment, _, _ = places
    names = sorted(path.stem for path in (resource_directory("slurm") / "profiles").glob("*.yaml"))
    assert names == ["example-container", "example-cpu", "example-gpu"]
    for name in names:
        profile = find_profile(name, environment)
        assert profile is not None
        assert profile.path.parent == profile_directories(environment)[-1]


def test_nearest_place_wins_and_default_is_used_where_none_is_named(places):
    environment, user, machine = places
    assert find_profile(None, environment) is None
    (machine / "default.yaml").write_text("partition: machine")
    (machine / "big.yaml").write_text("partition: machines-big")
    assert find_profile(None, environment).values == {"partition": "machine"}
    (user / "default.yaml").write_text("partition: mine")
    assert find_profile(None, environment).values == {"partition": "mine"}
    assert find_profile("big", environment).values == {"partition": "machines-big"}
    assert find_profile("none", environment) is None


def test_a_path_is_taken(places, tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text("")
    profile = find_profile(str(path), places[0])
    assert (profile.name, profile.values) == ("here", {})


@pytest.mark.parametrize(("text", "words"), [
    ("partitoin: gpu", "did you mean partition?"),
    ("container: {runtime: pyxis, imgae: x}", "did you mean image?"),
    ("nodes: many", "must be a whole number"),
    ("time: 30", "must be text"),
    ("gres_style: gpu", "must be one of gpus-per-node, gres, gpus-per-task"),
    ("environment: {DEBUG: true}", "put it in quotes"),
    ("partition: 'gpu; id'", "sbatch takes names"),
    ("setup: ['export HF_TOKEN=hf_x']", "looks like a secret"),
    ("sbatch_options: {wrap: id}", "not among the sbatch options"),
    ("sbatch_options: {mem: 1G}", "set launch.slurm.memory_per_node instead"),
    ("profile: other", "a profile names no other"),
    ("launch: {slurm: {partition: gpu}}", "without launch: and slurm:"),
    ("- partition", "must be a mapping"),
    ("partition: [", "line 1"),
    ("\\x00", "refused"),
])  # fmt: skip
def test_bad_profile_is_refused_by_its_name(places, text, words):
    environment, user, _ = places
    (user / "site.yaml").write_text(text)
    with pytest.raises(RefusedError) as error:
        find_profile("site", environment)
    assert words in str(error.value)
    assert str(user / "site.yaml") in str(error.value)


@pytest.mark.parametrize("name", ["../site", "a b", "", "$(id)", "-x", "gone.yaml", "/etc/passwd"])
def test_odd_name_is_refused(places, name):
    with pytest.raises(RefusedError):
        find_profile(name, places[0])


def test_unknown_name_names_the_nearest(places):
    with pytest.raises(RefusedError, match="did you mean example-gpu"):
        find_profile("exmple-gpu", places[0])


def test_profile_that_everybody_may_write_is_refused(places):
    environment, user, _ = places
    (user / "site.yaml").write_text("setup: [id]")
    (user / "site.yaml").chmod(0o666)
    with pytest.raises(RefusedError, match="everybody may write it"):
        find_profile("site", environment)


def write_recipe(directory: Path) -> Path:
    shard = write_tiny_shard(directory / "shard", 200, vocab_size=64, dtype="uint16", num_tokens=200)
    path = directory / "recipe.yaml"
    path.write_text(f"""
run: {{directory: {directory}/run, steps: 4}}
model: {{config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
                   num_attention_heads: 4, vocab_size: 64}}}}
data: {{train: [{{path: {shard}}}], sequence_length: 16}}
batch: {{global_size: 8}}
launch: {{slurm: {{qos: from-recipe, account: from-recipe, environment: {{A: recipe}}}}}}
""")
    return path


def test_precedence_is_defaults_profile_recipe_command_line(places, tmp_path):
    environment, user, _ = places
    (user / "site.yaml").write_text(
        "{partition: from-profile, qos: from-profile, account: from-profile, gpus_per_node: 2, "
        "environment: {A: profile, B: profile}, signal_seconds: 60, time: '30'}"
    )
    profile = find_profile("site", environment)
    overrides = ["launch.launcher=slurm", "launch.slurm.account=from-command-line"]
    slurm = prepare(write_recipe(tmp_path), overrides, None, profile.under).recipe.launch.slurm
    assert (slurm.nodes, slurm.partition, slurm.qos, slurm.account) == (
        1, "from-profile", "from-recipe", "from-command-line",
    )  # fmt: skip
    assert slurm.environment == {"A": "recipe", "B": "profile"}
    assert profile.for_ranks(slurm) == [
        "launch.slurm.gpus_per_node=2", "launch.slurm.time='30'", "launch.slurm.signal_seconds=60",
    ]  # fmt: skip
    # With these the job itself, which does not read the profile, resolves the same numbers.
    again = prepare(write_recipe(tmp_path), [*overrides, *profile.for_ranks(slurm)]).recipe.launch.slurm
    assert (again.gpus_per_node, again.time, again.signal_seconds) == (2, "30", 60)
