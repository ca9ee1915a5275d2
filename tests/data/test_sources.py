"""Splits of folders, tables of other people, and a cache that cannot be written."""

import pytest
from data_sets import load, only, png, write_jsonl

from apo_lora.errors import DataError


def set_of(folder, *names):
    """Files of these names, each with one row whose answer is the name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"problem": "?", "answer": name}
        if path.suffix == ".parquet":
            import pandas

            pandas.DataFrame([row]).to_parquet(path)
        else:
            write_jsonl(path, [row] if path.suffix == ".jsonl" else [[row]])
    return folder


@pytest.mark.parametrize(
    ("names", "split", "answer"),
    [
        (["train.jsonl", "test.jsonl"], "test", "test.jsonl"),
        (["shapes_train.jsonl", "shapes_test.jsonl"], "train", "shapes_train.jsonl"),
        (["val.jsonl", "train.jsonl"], "validation", "val.jsonl"),
        (["train/rows.jsonl", "test/rows.jsonl"], "test", "test/rows.jsonl"),
        (["data/dev/rows.jsonl", "data/train/rows.jsonl"], "validation", "data/dev/rows.jsonl"),
        (["mini-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "mini", "mini-00000-of-00001.parquet"),
        (["train.json", "config.json"], "train", "train.json"),
        (["train.jsonl", "train-extra.jsonl"], "train", "train.jsonl"),
        (["data.jsonl"], "test", "data.jsonl"),
        (["rows.jsonl", "config.json"], "train", "rows.jsonl"),
    ],
)  # fmt: skip
def test_a_split_is_read_from_its_own_file(names, split, answer, tmp_path):
    assert only(load(set_of(tmp_path, *names), split=split)).answer == answer


@pytest.mark.parametrize(
    ("names", "split", "others"),
    [
        (["train.jsonl"], "test", "train"),
        (["test.jsonl"], "train", "test"),
        (["data.jsonl", "test.jsonl"], "train", "test"),
        (["training/rows.jsonl", "val/rows.jsonl"], "test", "train, validation"),
        (["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"], "test", "train, validation"),
        (["data/mini-00000-of-00001.parquet"], "train", "mini"),
    ],
)
def test_a_split_that_is_not_there_reads_nothing_else(names, split, others, tmp_path):
    with pytest.raises(DataError, match=f"no split '{split}'; it has {others}; set data.split or data.eval_split"):
        load(set_of(tmp_path, *names), split=split)


@pytest.mark.parametrize("names", [["a_train.jsonl", "b_train.jsonl"], ["train/a.jsonl", "train/b.jsonl"]])
def test_two_files_of_a_split_are_not_guessed_at(names, tmp_path):
    with pytest.raises(DataError, match="several files match split 'train'"):
        load(set_of(tmp_path, *names))


def test_image_paths_start_at_the_table_or_at_the_whole_set(tmp_path):
    row = {"problem": "?", "answer": "1", "image": "pictures/a.png"}
    for place in (tmp_path / "train", tmp_path):
        (place / "pictures").mkdir(parents=True)
        write_jsonl(tmp_path / "train" / "rows.jsonl", [row])
        (place / "pictures" / "a.png").write_bytes(png())
        assert only(load(tmp_path)).images[0].path == place / "pictures" / "a.png"
        (place / "pictures" / "a.png").unlink()


def test_bytes_are_text_where_text_belongs(tmp_path):
    import pandas

    table = {"problem": [b"Which?"], "answer": [b"drum"], "choices": [[b"kite", b"drum"]], "image": [png()]}
    pandas.DataFrame(table).to_parquet(tmp_path / "data.parquet")
    example = only(load(tmp_path / "data.parquet"))
    assert (example.problem, example.answer, example.choices) == ("Which?", "drum", ("kite", "drum"))
    assert example.images[0].size == (60, 30)


def test_names_of_classes_at_any_depth(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["kite", "drum"])
    features = datasets.Features(
        problem=datasets.Value("string"),
        answer=datasets.List(label),
        facts={"kind": label, "all": datasets.List(label)},
    )
    rows = {"problem": ["?"] * 2, "answer": [[1], [0]], "facts": [{"kind": 0, "all": [0, 1]}, {"kind": -1, "all": []}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    assert [example.answer for example in load(tmp_path / "data.parquet").examples] == ["drum", "kite"]
    from data_sets import section

    named = section(columns={"answer": "facts.kind", "choices": "facts.all"})
    loaded = load(tmp_path / "data.parquet", data=named)
    assert (loaded.examples[0].answer, loaded.examples[0].choices) == ("kite", ("kite", "drum"))
    assert [row for row, _ in loaded.dropped["no answer"]] == [2]


@pytest.mark.parametrize("place", ["file", "file/cache"])
def test_a_cache_that_cannot_be_written_is_not_the_datas_fault(place, tmp_path, monkeypatch):
    import datasets

    path = set_of(tmp_path, "data.parquet") / "data.parquet"
    assert only(load(path)).answer == "data.parquet"
    (tmp_path / "file").touch()
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / place)
    with pytest.raises(DataError, match=f"{place}: the cache of `datasets` cannot be written .*set HF_HOME or"):
        load(path)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="data.parquet: cannot be read as Parquet"):
        load(path)
