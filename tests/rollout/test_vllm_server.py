"""A real vLLM server on this machine's CPU, with the embedded model: one server for all of these tests."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PROJECT
from forks import two_processes
from peft import get_peft_model_state_dict
from PIL import Image
from stirred_adapters import stir, stirred_run

from apo_lora.chat.chat import chat
from apo_lora.commands.main import main
from apo_lora.data.examples import load_examples
from apo_lora.errors import DataError, ModelError, TrainingStopped
from apo_lora.machine import vllm_environment
from apo_lora.policy.loading import limit_image_size, load_policy, reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.preflight.checks import check_server
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.rollout.vllm.client import Endpoint, ServerFault
from apo_lora.rollout.vllm.sampler import VllmSampler, as_request
from apo_lora.rollout.vllm.server import KEY, LocalServer, serving
from apo_lora.run.adapter import find_adapter
from apo_lora.run.directory import RunDir
from apo_lora.run.figures import ALARM_DIFFERENCE
from apo_lora.run.files import read_jsonl

pytestmark = pytest.mark.slow

SIZES = ((84, 84), (112, 56), (200, 140), (61, 300))
RECIPE = load_recipe(find_recipe("tiny_cpu"), ["rollout.engine=vllm", "grpo.max_completion_length=24"])
BY_TEXT = f"rewards.functions=[accuracy,{PROJECT / 'tests/faults/rewards.py'}:by_text]"


@pytest.fixture(scope="module")
def environment():
    """Made once in the user's cache folder, where it stays."""
    try:
        return vllm_environment.set_up()
    except ModelError as error:
        pytest.skip(f"vLLM's packages cannot be had here: {error}")


@pytest.fixture(scope="module")
def boards():
    return load_examples("boards", RECIPE.data, split="train", limit=4).examples


@pytest.fixture(scope="module")
def server(environment, boards, tmp_path_factory):
    with serving(RECIPE, tmp_path_factory.mktemp("run"), boards) as server:
        yield server


@pytest.fixture
def policy(tiny_policy):
    stir(tiny_policy.model, scale=0.05)  # moves log-probs by 1 nat
    return tiny_policy


def pictures(sizes=SIZES):
    """A question about a picture of each size."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes]
    return [Image.fromarray(array.numpy()) for array in pixels]


def item_of(image):
    content = [{"type": "image"}, {"type": "text", "text": "How many red shapes are there?"}]
    return {"prompt": [{"role": "user", "content": content}], "images": [image]}


def batch_of(policy, images, completions=None):
    """The trainer's own reading: processor's inputs, and a batch with these completions."""
    texts = [
        policy.processor.apply_chat_template(item_of(image)["prompt"], add_generation_prompt=True, tokenize=False)
        for image in images
    ]
    inputs = policy.processor(
        text=texts, images=[[image] for image in images], padding=True, padding_side="left", return_tensors="pt"
    )
    ids = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    if completions is None:
        return ids, None
    width = max(map(len, completions))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    return ids, {
        "prompt_ids": inputs["input_ids"],
        "prompt_mask": inputs["attention_mask"],
        "completion_ids": padded,
        "completion_mask": mask,
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
        "mm_token_type_ids": inputs["mm_token_type_ids"],
        "num_images": [1] * len(images),
    }


def asked(server, policy, images, *, step=0, sampler=None, per_prompt=2):
    """(images, completions, their log-probs by vLLM), row by row, each image with its own prompt."""
    sampler = sampler or VllmSampler(server, policy, RECIPE)
    rows = [image for image in images for _ in range(per_prompt)]
    groups = [number for number in range(len(images)) for _ in range(per_prompt)]
    prompt_ids, _ = batch_of(policy, rows)
    completions, logps, _ = sampler(policy.model, step, list(map(item_of, rows)), prompt_ids, groups)
    return rows, completions, logps


def scored(policy, images, completions):
    """Log-probs of these completions by the trainer now, one after the other."""
    _, batch = batch_of(policy, images, completions)
    with torch.no_grad():
        logps, _ = token_logps(policy.model, batch)
    return sum([row[: len(ids)].tolist() for row, ids in zip(logps, completions, strict=True)], [])


def sampled(server, policy, images, **options):
    """(completions, their log-probs by vLLM, by the trainer now); see asked()."""
    rows, completions, logps = asked(server, policy, images, **options)
    return completions, sum(logps, []), scored(policy, rows, completions)


def difference(one, other):
    """Mean, in nats per token. vLLM's kernels for CPUs round to about 1e-5; measured here: 3e-5."""
    return (torch.tensor(one) - torch.tensor(other)).abs().mean().item()


MOST = 3e-4


def test_its_log_probs_are_those_of_the_trainer_with_the_same_adapter(server, policy):
    completions, theirs, ours = sampled(server, policy, pictures())
    assert len(theirs) > 60 and difference(theirs, ours) < MOST
    assert not set(policy.never_sampled) & {token for row in completions for token in row}


@pytest.mark.matrix
def test_a_qwen3_vl_is_served_as_it_is_trained(environment, boards, small_qwen3_vl, tmp_path):
    """By a server of its own, before that of the other tests begins: two would take turns on the cores."""
    recipe = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"name": small_qwen3_vl})})
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=0)
    stir(policy.model, scale=0.05)
    with serving(recipe, tmp_path, boards) as server:
        sampler = VllmSampler(server, policy, recipe)
        # Random weights give vision tokens 1 % of the probability, which the trainer does not take away.
        sampler.options["logit_bias"], sampler.never_sampled = {}, set()
        rows = list(zip(*asked(server, policy, pictures(), sampler=sampler), strict=True))
    images, completions, logps = zip(*[row for row in rows if not set(policy.never_sampled) & set(row[1])], strict=True)
    theirs, ours = sum(logps, []), scored(policy, images, completions)
    with reference_mode(policy.model):
        without = scored(policy, images, completions)
    assert len(theirs) > 60 and difference(theirs, ours) < MOST < 0.01 < difference(theirs, without)


def test_preflight_compares_it_with_the_trainer(server, tiny_policy, boards, monkeypatch):
    before = [parameter.clone() for parameter in tiny_policy.model.parameters()]
    check = check_server(tiny_policy, boards, RECIPE, server)
    assert check.ok and "4 prompts read alike; log-probs of 64 tokens" in check.found
    narrow = RECIPE.model_copy(update={"grpo": RECIPE.grpo.model_copy(update={"top_k": 1})})
    assert check_server(tiny_policy, boards, narrow, server).ok
    assert all(map(torch.equal, tiny_policy.model.parameters(), before))
    # As if the server took no notice of the adapter that it is sent.
    monkeypatch.setattr(type(tiny_policy.model), "save_pretrained", saves_zeros(tiny_policy.model))
    assert not check_server(tiny_policy, boards, RECIPE, server).ok
    monkeypatch.setattr(tiny_policy.processor, "chat_template", tiny_policy.processor.chat_template + "Please.")
    check = check_server(tiny_policy, boards, RECIPE, server)
    assert not check.ok and "vLLM read" in check.found


def saves_zeros(model):
    save = type(model).save_pretrained

    def save_zeros(self, folder):
        state = {name: torch.zeros_like(value) for name, value in get_peft_model_state_dict(self).items()}
        save(self, folder, state_dict=state)

    return save_zeros


def test_a_stale_adapter_would_be_noticed(server, policy):
    """And the adapter of the next step is not stale."""
    sampler = VllmSampler(server, policy, RECIPE)
    sampled(server, policy, pictures(), step=0, sampler=sampler)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    _, theirs, ours = sampled(
        server, policy, pictures(), step=0, sampler=sampler
    )  # the step's adapter is there already
    assert difference(theirs, ours) > ALARM_DIFFERENCE
    _, theirs, ours = sampled(server, policy, pictures(), step=1, sampler=sampler)
    assert difference(theirs, ours) < MOST
    served = [model["id"] for model in server.endpoints[0].ask("/v1/models")["data"]]
    assert f"{sampler.run}-step-1" in served and f"{sampler.run}-step-0" not in served


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_samples_from_the_trainers_distribution(server, policy, temperature):
    """The next token's whole distribution, as far as the API tells it, on pictures of several sizes."""
    sampler = VllmSampler(server, policy, RECIPE)
    images = pictures()
    sampled(server, policy, images[:1], sampler=sampler, per_prompt=1)
    options = sampler.options | {"temperature": temperature, "max_tokens": 1, "top_logprobs": 20}
    for image in images:
        answer = server.endpoints[0].ask(
            "/v1/chat/completions",
            {
                "model": server.adapter,
                "messages": as_request(item_of(image)),
                "return_tokens_as_token_ids": True,
                "mm_processor_kwargs": {"size": dict(policy.processor.image_processor.size)},
                **options,
            },
        )
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        tokens = [int(entry["token"].removeprefix("token_id:")) for entry in top]
        _, batch = batch_of(policy, [image] * len(tokens), [[token] for token in tokens])
        with torch.no_grad():
            ours = token_logps(policy.model, batch, temperature=temperature)[0].flatten()
        theirs = torch.tensor([entry["logprob"] for entry in top])
        assert len(tokens) >= 20 and ours.exp().sum() > 0.9
        assert (theirs.exp() - ours.exp()).abs().max() < 1e-3


def test_max_pixels_reaches_it_with_every_request(server, policy):
    images = pictures()
    full, _ = batch_of(policy, images)
    limit_image_size(policy.processor, RECIPE.data.model_copy(update={"max_pixels": 4 * 784}))
    small, _ = batch_of(policy, images)
    assert max(map(len, small)) < max(map(len, full))
    _, theirs, ours = sampled(server, policy, images)  # compares the prompts
    assert difference(theirs, ours) < MOST


def test_prompts_that_do_not_fit_into_one_pass_are_read_all_the_same(server, policy):
    """vLLM reads 2,072 tokens at once here, and fails on a CPU where it must read a prompt in parts."""
    images = pictures([(560, 560 + 28 * number) for number in range(10)])
    assert sum(map(len, batch_of(policy, images)[0])) > 2072
    completions, _, _ = sampled(server, policy, images)
    assert len(completions) == 20


def test_a_prompt_that_it_reads_otherwise_ends_the_run(server, policy):
    image = pictures()[0]
    ids, _ = batch_of(policy, [image])
    sampler = VllmSampler(server, policy, RECIPE)
    with pytest.raises(TrainingStopped, match="differ from token 5 on"):
        sampler(policy.model, 0, [item_of(image)], [ids[0][:5] + [1] + ids[0][6:]], [0])


def test_it_listens_on_the_loopback_only_and_answers_to_its_key_only(server):
    leader = psutil.Process(server.process.pid)
    processes = [leader, *leader.children(recursive=True)]
    listening = [c for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening and {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1"}
    stranger = Endpoint(server.endpoints[0].url, "guess", 10.0)
    for path, body in (("/v1/models", None), ("/metrics", None), ("/adapters", {}), ("/v1/load_lora_adapter", {})):
        with pytest.raises(ServerFault, match="it answered 401"):
            stranger.ask(path, body)
    assert server.endpoints[0].key not in server.log.read_text()
    assert not any(server.endpoints[0].key in part for process in processes for part in process.cmdline())


def command(server, folder):
    """A run of four steps through the server's URL, as if it were on another machine."""
    return [
        "train", "--recipe", "tiny_cpu", "--resume", "auto", "rollout.engine=vllm", "train.max_steps=4",
        f"rollout.servers=['{server.endpoints[0].url}']", "train.save_steps=2", "grpo.prompts_per_step=2",
        "grpo.num_generations=4", "grpo.completions_per_pass=4", "grpo.max_completion_length=24",
        "train.evaluate=false", "train.preflight=false", "data.limit=16", f"output.dir={folder}",
    ]  # fmt: skip


def completions_of(run):
    return [row["completion"] for row in read_jsonl(run.completions)]


@pytest.fixture
def its_key(server, monkeypatch):
    monkeypatch.setenv(KEY, server.endpoints[0].key)


@pytest.fixture(scope="module")
def whole_run(server, tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, server.endpoints[0].key)
        assert main(command(server, run.path)) == 0
    return run


def test_a_run_on_it_records_how_far_the_two_are_apart(whole_run, server):
    rows = list(read_jsonl(whole_run.metrics))
    assert all(row["sampler_difference"] < 1e-3 and 0.9 < row["importance_weight"] < 1.1 for row in rows)
    assert all(row["importance_weight_max"] <= RECIPE.rollout.importance_cap for row in rows)
    assert not [path for path in whole_run.path.iterdir() if path.name.startswith(".")]
    assert {model["id"] for model in server.endpoints[0].ask("/v1/models")["data"]} <= {"base", server.adapter}
    texts = [path.read_text() for path in whole_run.path.glob("*.*") if path.suffix != ".png"]
    assert texts and not any(server.endpoints[0].key in text for text in texts)


def test_a_run_that_loses_it_stops_in_order_and_continues(server, whole_run, its_key, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("apo_lora.rollout.vllm.server.RemoteServers.PATIENCE", 0.0)
    cut, ask = RunDir(tmp_path / "cut"), Endpoint.ask

    def lost(self, path, body=None):
        if str((body or {}).get("lora_name", "")).endswith("-step-2"):
            raise ServerFault("it answered 500")
        return ask(self, path, body)

    monkeypatch.setattr(Endpoint, "ask", lost)
    assert main(command(server, cut.path)) == 1
    said = capfd.readouterr()
    assert "vLLM failed again after a restart: it answered 500" in said.err
    assert server.endpoints[0].key not in said.out + said.err
    assert [path.name for path in cut.valid_checkpoints()] == ["checkpoint-2"]
    monkeypatch.setattr(Endpoint, "ask", ask)
    assert main(command(server, cut.path)) == 0
    assert completions_of(cut) == completions_of(whole_run) and len(completions_of(cut)) == 4 * 8


def test_a_run_that_samples_ahead_says_with_which_adapter(server, whole_run, its_key, tmp_path, monkeypatch, capfd):
    """And it stops in order where the server is lost meanwhile; continued, it begins with the checkpoint's adapter.

    It starts from an adapter, which stays its reference and is not what the server gets, and is measured meanwhile.
    """
    monkeypatch.setattr("apo_lora.rollout.vllm.server.RemoteServers.PATIENCE", 0.0)
    run, ask = RunDir(tmp_path / "ahead"), Endpoint.ask
    ahead = [
        *command(server, run.path), "rollout.ahead=1", f"lora.start={whole_run.adapter}", "grpo.reference=start",
        "train.evaluate=true", "train.eval_steps=1", "data.eval_limit=2", "data.general=null", BY_TEXT,
    ]  # fmt: skip

    def lost(self, path, body=None):
        if str((body or {}).get("model", "")).endswith("-step-2"):
            raise ServerFault("it answered 500")
        return ask(self, path, body)

    monkeypatch.setattr(Endpoint, "ask", lost)
    assert main(ahead) == 1
    assert "vLLM failed again after a restart: it answered 500" in capfd.readouterr().err
    assert [path.name for path in run.valid_checkpoints()] == ["checkpoint-2"]
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3]  # the third had been sampled before
    monkeypatch.setattr(Endpoint, "ask", ask)
    assert main(ahead) == 0
    rows = list(read_jsonl(run.metrics))
    assert rows[0]["kl"] == 0 < rows[2]["kl"] and all(row["held_out_length"] > 0 for row in rows)
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1]
    by = {row["step"]: row["adapter_step"] for row in read_jsonl(run.completions)}
    assert by == {1: 0, 2: 0, 3: 2, 4: 2}
    fresh, stale = rows[2]["sampler_difference"], rows[3]["sampler_difference"]
    assert fresh < 1e-4 < 1e-3 < stale
    assert all(0.5 < row["importance_weight"] < 1.5 for row in rows)


@pytest.mark.matrix
def test_a_run_that_is_killed_while_it_samples_continues(server, whole_run, its_key, tmp_path):
    killed = RunDir(tmp_path / "killed")
    arguments = [sys.executable, "-m", "apo_lora", *command(server, killed.path)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not (
            killed.metrics.exists() and len(killed.metrics.read_text().splitlines()) == 3
        ):
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL and [p.name for p in killed.valid_checkpoints()] == ["checkpoint-2"]
    assert main(command(server, killed.path)) == 0
    assert completions_of(killed) == completions_of(whole_run)
    assert not [path for path in killed.path.iterdir() if path.name.startswith(".")]


@pytest.mark.matrix
def test_two_processes_of_a_run_share_a_server(server, its_key, tmp_path):
    """Each loads the adapter of the step under a name of its own."""
    run = RunDir(tmp_path / "run")
    processes = two_processes(["-m", "apo_lora", *command(server, run.path)])
    outputs = ["".join(process.communicate(timeout=600)) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    rows, completions = list(read_jsonl(run.metrics)), list(read_jsonl(run.completions))
    assert len(rows) == 4 and all(row["sampler_difference"] < 1e-3 for row in rows)
    assert [row["adapter_step"] for row in completions] == [step for step in range(4) for _ in range(8)]
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


@pytest.mark.matrix
def test_a_server_that_is_killed_while_it_samples_is_replaced(server, whole_run, tmp_path, monkeypatch, capfd):
    """Its run's own one: the rollout is repeated, and the run ends as if nothing had been."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a faulty server leaves its log
    started, start, ask = [], LocalServer.start, Endpoint.ask

    def noted(self):
        start(self)
        started.append(self.process.pid)

    def killing(self, path, body=None):
        if len(started) == 1 and str((body or {}).get("model", "")).endswith("-step-2"):
            with suppress(ProcessLookupError):
                os.killpg(started[0], signal.SIGKILL)
        return ask(self, path, body)

    monkeypatch.setattr(LocalServer, "start", noted)
    monkeypatch.setattr(Endpoint, "ask", killing)
    run = RunDir(tmp_path / "run")
    assert main([*command(server, run.path), "rollout.servers=auto"]) == 0
    said = capfd.readouterr().out
    assert "it was ended by SIGKILL" in said and said.count("it is restarted, and the rollout repeated") == 1
    assert completions_of(run) == completions_of(whole_run)
    assert len(started) == 2 and not any(map(_alive, started))


def test_an_evaluation_gives_the_same_verdicts_as_the_models_own_answers(server, its_key, tmp_path):
    """Greedy answers differ only where two tokens are as likely within the kernels' rounding."""
    run = stirred_run(tmp_path / "run", [f"rollout.servers=['{server.endpoints[0].url}']"], scale=0.05)
    answers = {}
    for engine in ("transformers", "vllm"):
        options = ["--engine", engine, "--name", engine, "--limit", "6", "--samples", "1"]
        small = ["--set", "grpo.max_completion_length=24", "--set", "data.general=null"]
        assert main(["eval", str(run.path), *options, *small]) == 0
        rows = list(read_jsonl(run.evaluations / engine / "answers.jsonl"))
        answers[engine] = {(row["model"], row["row"]): row for row in rows if row["greedy"]}
        assert len(rows) == 2 * 6 * 2
    own, theirs = answers["transformers"], answers["vllm"]
    same = [key for key in own if own[key]["text"] == theirs[key]["text"]]
    assert own.keys() == theirs.keys() and len(same) >= 11
    assert all(own[key]["entropy"] == pytest.approx(theirs[key]["entropy"], abs=1e-3) for key in same)
    assert all(own[key]["correct"] == theirs[key]["correct"] for key in same)
    assert any(own["base", row]["text"] != own["tuned", row]["text"] for _, row in own)


def test_a_chat_gives_the_same_answers(server, its_key, boards, tmp_path):
    settings = [f"rollout.servers=['{server.endpoints[0].url}']", "grpo.max_completion_length=24"]
    run = stirred_run(tmp_path / "run", settings, scale=0.15)
    boards[0].images[0].open().save(tmp_path / "board.png")
    written = {}
    for engine in ("transformers", "vllm"):
        out = io.StringIO()
        options = {"image": str(tmp_path / "board.png"), "max_tokens": 20, "engine": engine}
        written[engine] = chat(find_adapter(run.path), "How many red shapes?", out, **options), out.getvalue()
    assert written["vllm"] == written["transformers"]
    base, tuned = written["vllm"][0]
    assert base.text != tuned.text and base.truncated
    with pytest.raises(DataError, match="data.max_prompt_tokens is .*; use --engine transformers"):
        chat(find_adapter(run.path), "How many? " * 2000, io.StringIO(), engine="vllm")


def test_a_server_for_shorter_sequences_is_refused(server, its_key, tmp_path, capsys):
    servers = [f"rollout.servers=['{server.endpoints[0].url}']", f"data.max_prompt_tokens={2**20}"]
    assert main(["train", "--recipe", "tiny_cpu", "rollout.engine=vllm", *servers, f"output.dir={tmp_path}/run"]) == 2
    assert "start it with --max-model-len" in capsys.readouterr().err


def test_it_ends_when_its_trainer_is_killed(environment, tmp_path):
    """Also while it starts: nobody is left to stop it."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from apo_lora.rollout.vllm.server import LocalServer\n"
        "server = LocalServer(['--model', sys.argv[1]], gpu=None, port=0, seconds=60)\n"
        "server._wait = lambda: (print(server.process.pid, server.folder, flush=True), time.sleep(60))\n"
        "server.start()\n"
    )
    from apo_lora.tiny import BASE_DIR

    with subprocess.Popen([sys.executable, "-c", code, str(BASE_DIR)], stdout=subprocess.PIPE, text=True) as trainer:
        pid, folder = trainer.stdout.readline().split()
        assert psutil.pid_exists(int(pid))
        os.kill(trainer.pid, signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(int(pid)):
        time.sleep(0.2)
    assert not _alive(int(pid)) and not Path(folder).exists()


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
