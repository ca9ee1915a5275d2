"""The comparison of the twin's packages with a newer list of Colab's."""

import watch

TWIN = watch.versions((watch.HERE / "packages.txt").read_text())


def write(tmp_path, packages):
    file = tmp_path / "freeze.txt"
    lines = [f"{name}=={version}" for name, version in packages.items()]
    file.write_text("\n".join(["# a comment", "google-colab @ file:///somewhere", *lines]))
    return str(file)


def test_the_same_list_breaks_nothing(tmp_path, capsys):
    assert set(watch.RELIED_ON) <= set(TWIN)
    assert watch.main(write(tmp_path, TWIN), "3.13.15") == 0
    out = capsys.readouterr().out
    assert f"0 of the twin's {len(TWIN)} packages have moved" in out and "Nothing" in out


def test_what_the_notebook_relies_on_is_named_and_the_rest_is_counted(tmp_path, capsys):
    now = {**TWIN, "ipython": "9.1.0", "numpy": "3.0.0"}
    del now["traitlets"]
    assert watch.main(write(tmp_path, now), "3.15") == 1
    out = capsys.readouterr().out
    assert "3 of the twin's" in out and "numpy 2.1.3 -> 3.0.0" in out
    assert "may break: ipython 7.34.0 -> 9.1.0" in out and "may break: traitlets is gone" in out
    assert "may break: Python 3.15 is not one of apo-lora's" in out
    assert "may break: numpy" not in out  # the kernel's side imports none of it


def test_a_file_that_is_no_list_is_one_line(tmp_path, capsys):
    assert watch.main(write(tmp_path, {})) == 2
    assert capsys.readouterr().err.count("\n") == 1
