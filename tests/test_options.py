import pytest

from llava_pitome.cli.options import Option, boolean, folder, listed, one_of, parse, shares, whole

OPTIONS = {
    "ratio": Option(0.9, shares, "a number in (0, 1]", ""),
    "limit": Option(None, whole(1), "a whole number from 1", ""),
    "dtype": Option("auto", one_of("auto", "float32"), "auto | float32", ""),
    "baseline": Option(True, boolean, "true | false", ""),
    "tasks": Option(("a",), listed, "names", ""),
}


def test_defaults_fill_what_is_not_given():
    assert parse([], OPTIONS) == {
        "ratio": 0.9, "limit": None, "dtype": "auto", "baseline": True, "tasks": ("a",)
    }  # fmt: skip


def test_words_are_read_by_their_type():
    words = ["ratio=0.5,0.75", "limit=3", "dtype=float32", "baseline=false", "tasks=b,c"]
    assert parse(words, OPTIONS) == {
        "ratio": (0.5, 0.75), "limit": 3, "dtype": "float32", "baseline": False, "tasks": ("b", "c"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "word",
    [
        "ratio=0",
        "ratio=1.1",
        "ratio=x",
        "ratio=",
        "limit=0",
        "limit=1.5",
        "dtype=int8",
        "baseline=yes",
        "tasks=a,,b",
    ],
)
def test_a_bad_value_is_an_error_that_names_key_value_and_what_is_allowed(word):
    key, _, value = word.partition("=")
    with pytest.raises(ValueError, match="allowed") as error:
        parse([word], OPTIONS)
    assert key in str(error.value) and repr(value) in str(error.value)
    assert OPTIONS[key].allowed in str(error.value)


def test_an_unknown_key_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"'ration'.*'ratio'"):
        parse(["ration=0.9"], OPTIONS)


def test_a_word_without_a_value_and_a_key_given_twice_are_errors():
    with pytest.raises(ValueError, match="'fast' is not key=value"):
        parse(["fast"], OPTIONS)
    with pytest.raises(ValueError, match="limit is given twice"):
        parse(["limit=1", "limit=2"], OPTIONS)


def test_a_folder_may_be_missing_but_is_no_file(tmp_path):
    options = {"output": Option("out", folder, "a folder, not a file", "where")}
    assert parse([f"output={tmp_path}"], options) == {"output": str(tmp_path)}
    assert parse([f"output={tmp_path / 'none'}"], options) == {"output": str(tmp_path / "none")}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file' is not allowed; allowed: a folder, not a file"):
        parse([f"output={tmp_path / 'file'}"], options)
