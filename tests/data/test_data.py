"""Data sets of which a part cannot be used, what TRL is given of them, and real ones; loading decodes nothing."""

import copy
import pickle

import pytest
from data_sets import PROCESSORS, SHARED, SIZES, content, example_of, load, picture, section, write_jsonl

from apo_lora.data.examples import Example, Loaded, drop_long_prompts, prompt_lengths
from apo_lora.data.images import ImageRef
from apo_lora.data.items import prompt_dataset, training_order
from apo_lora.errors import DataError

# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_few_bad_rows_are_dropped_and_counted(folder):
    good = {"image": "a.png", "problem": "?", "answer": "1"}
    bad = [{**good, "answer": "?!."}, {**good, "image": "none.png"}, {**good, "answer": None}, "text", {}]
    loaded = load(write_jsonl(folder / "data.jsonl", [good] * 6 + bad))
    assert [example.row for example in loaded.examples] == [1, 2, 3, 4, 5, 6]
    assert {reason: [row for row, _ in rows] for reason, rows in loaded.dropped.items()} == {
        "unparsable gold": [7],
        "image missing": [8],
        "no answer": [9],
        "not a mapping": [10],
        "no problem": [11],
    }
    assert loaded.summary() == (
        f"11 rows of {folder / 'data.jsonl'}; 5 dropped (1 unparsable gold: row 7; 1 image missing: row 8; "
        "1 no answer: row 9; 1 not a mapping: row 10; 1 no problem: row 11)"
    )


def test_mostly_bad_rows_are_refused(folder):
    good = {"image": "a.png", "problem": "?", "answer": "1"}
    path = write_jsonl(folder / "data.jsonl", [good, good] + [{**good, "image": f"{i}.png"} for i in range(4)])
    with pytest.raises(DataError) as caught:
        load(path)
    head, *rows = caught.value.problems
    assert head.startswith(
        f"{path}: 4 of 6 rows cannot be used (read problem from 'problem', answer from 'answer', image"
    )
    assert [row.split(": ")[0] for row in rows] == [f"{path} row {n}" for n in (3, 4, 5)]
    assert "image missing" in rows[0] and "0.png" in rows[0]
    assert len(load(path, limit=4).examples) == 2  # half is still accepted


# --- what TRL is given -----------------------------------------------------------------------------------------------


def test_items_decode_each_image_once(folder, decodings):
    rows = [{"image": f"{name}.png", "problem": name, "answer": "1", "choices": ["1", "2"]} for name in "abab"]
    examples = load(write_jsonl(folder / "data.jsonl", rows)).examples
    dataset = prompt_dataset(examples, section(instruction="I"))
    assert dataset.column_names == ["index"] and len(dataset) == 4 and decodings == []

    group = dataset.__getitems__([2, 2, 2, 1, 1, 1])  # as a data loader asks
    assert len(decodings) == 2
    assert [item["index"] for item in group] == [2, 2, 2, 1, 1, 1]
    assert group[0]["images"][0].size == (60, 30) and group[5]["images"][0].size == (20, 40)
    assert group[0]["images"][0].mode == "RGB"
    assert group[0]["answer"] == "1" and group[0]["choices"] == ["1", "2"] and group[0]["category"] is None
    assert group[0]["prompt"] == examples[2].messages(section(instruction="I"))
    dataset.__getitems__([2, 2, 1])  # the next step of the same rollout
    assert len(decodings) == 2
    assert dataset[0]["index"] == 0 and len(decodings) == 3
    assert [item["index"] for item in dataset.select([3, 1])] == [3, 1]


def test_copies_of_a_dataset_share_the_examples():
    large = ImageRef("i", (500, 500), picture(size=(500, 500)))
    assert len(pickle.dumps(large.source)) > 500_000
    dataset = prompt_dataset([Example(1, "Why?", "x", None, (large,))] * 3, section())
    # `datasets` pickles the transform to hash it, at every step like these.
    assert sorted(item["index"] for item in copy.deepcopy(dataset).shuffle(seed=0).select([0, 1, 2])) == [0, 1, 2]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)[2]["images"][0].size == (500, 500)


def test_items_do_not_share_what_a_trainer_could_write_into(folder):
    examples = load(write_jsonl(folder / "data.jsonl", [{"image": "a.png", "problem": "?", "answer": "1"}])).examples
    first, second = prompt_dataset(examples, section()).__getitems__([0, 0])
    first["prompt"][0]["content"][0]["image"] = "x"
    first["images"].clear()
    assert "image" not in second["prompt"][0]["content"][0] and len(second["images"]) == 1


def test_text_only_data_and_the_refusal_of_a_mixture(folder):
    with_image, without = example_of("?", 1), example_of("?", 0)
    assert "images" not in prompt_dataset([without, without], section())[0]
    with pytest.raises(DataError, match="1 of 2 examples have no image .row 1.; .* separate runs"):
        prompt_dataset([with_image, without], section())


@pytest.fixture(params=list(PROCESSORS))
def processor(request):
    if not PROCESSORS[request.param].is_dir():
        pytest.skip(f"no {PROCESSORS[request.param]}")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(PROCESSORS[request.param])


@pytest.mark.parametrize("limits", [None, (28 * 28, 12 * 28 * 28)])
def test_counted_tokens_are_those_of_the_processor(processor, limits):
    from trl.data_utils import prepare_multimodal_messages

    if limits:
        processor.image_processor.size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    examples = [
        Example(1, "Is <image> odd?", "x", ("yes", "no"), (ImageRef("i", size, picture(size=size)),)) for size in SIZES
    ]
    examples.append(Example(1, "Are <image> and these?", "x", None, tuple(e.images[0] for e in examples[:3])))
    data = section(system_prompt="Think.", instruction="Answer in <answer> tags.")
    counted = prompt_lengths(examples, processor, data)
    assert len(set(counted)) > 2

    # The way of TRL's GRPOTrainer, for the whole batch.
    items = prompt_dataset(examples, data).__getitems__(list(range(len(examples))))
    prompts = [prepare_multimodal_messages(item["prompt"], images=item["images"]) for item in items]
    tokenized = processor.apply_chat_template(
        conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert counted == [len(ids) for ids in tokenized["input_ids"]]
    texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[item["images"] for item in items], text=texts, padding=True, return_tensors="pt")
    assert counted == inputs["attention_mask"].sum(dim=1).tolist()


def test_text_only_tokens(processor):
    data = section()
    text = processor.apply_chat_template(example_of("Why?").messages(data), add_generation_prompt=True, tokenize=False)
    assert prompt_lengths([example_of("Why?")], processor, data) == [len(processor(text=[text])["input_ids"][0])]
    assert prompt_lengths([], processor, data) == []


def test_long_prompts_are_dropped_and_counted(processor, decodings):
    short, long = example_of("Why?"), Example(7, "Why not? " * 50, "x", None, ())
    loaded = Loaded("here", [short, long], {"no answer": [(3, "empty")]}, 3)
    data = section(max_prompt_tokens=prompt_lengths([short], processor, section())[0])
    kept = drop_long_prompts(loaded, processor, data)
    assert kept.examples == [short]
    assert [row for row, _ in kept.dropped["prompt too long"]] == [7] and kept.dropped["no answer"] == [(3, "empty")]
    assert "1 prompt too long: row 7" in kept.summary()
    assert "prompt too long" not in loaded.dropped
    with pytest.raises(
        DataError, match="every prompt is longer than data.max_prompt_tokens = 1 .*lower data.max_pixels"
    ):
        drop_long_prompts(loaded, processor, section(max_prompt_tokens=1))
    assert decodings == []


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_rows"), [("puzzlevqa", 908), ("geometry3k_examples", 10)])
def test_shared_data_sets_load_whole(name, num_rows, decodings):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {SHARED / name}")
    loaded = load(SHARED / name)
    assert (loaded.num_rows, loaded.dropped, decodings) == (num_rows, {}, [])
    assert all(example.choices and len(example.images) == 1 for example in loaded.examples)
    assert content(loaded.examples[0])[1].count("\nA. ") == 1


def test_training_order_is_whole_epochs_and_longer_runs_begin_alike():
    order = training_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and len(order) == 12
    assert order[:5] != order[5:10]
    assert training_order(5, 30, seed=1)[:12] == order
    assert training_order(5, 12, seed=2) != order
