"""Options: one declaration for key=value and for flags, and MergeConfig's fields as options."""

import argparse
import dataclasses

import pytest

from llava_pitome import METHODS, MergeConfig
from llava_pitome.cli.options import (
    FIELD_TEXT,
    Option,
    add_flags,
    boolean,
    folder,
    helped,
    listed,
    merge_config,
    merge_options,
    number,
    one_of,
    parse,
    several,
    shares,
    usage,
    whole,
)
from llava_pitome.config_validation import KINDS

OPTIONS = {
    "ratio": Option(0.9, shares, "a number in (0, 1]", "share kept"),
    "max_new_tokens": Option(None, whole(1, 9), "a whole number from 1 to 9", "length"),
    "dtype": Option("auto", one_of("auto", "float32"), "auto | float32", "of 100% of the weights", "model"),
    "baseline": Option(True, boolean, "true | false", "compare"),
    "quick": Option(False, boolean, "true | false", "fewer rounds"),
    "proportional": Option(None, boolean, "true | false", "attention"),
    "tasks": Option(("a",), listed, "names", "", short="-t"),
    "image": Option([], str, "a file", "an image", repeats=True),
}
DEFAULTS = {key: option.default for key, option in OPTIONS.items()}


def flags(words, options=OPTIONS):
    parser = argparse.ArgumentParser()
    add_flags(parser, options)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize(
    "words, flag_words, values",
    [
        ([], [], {}),
        (["ratio=0.5,0.75"], ["--ratio", "0.5,0.75"], {"ratio": (0.5, 0.75)}),
        (["ratio=1"], ["--ratio=1"], {"ratio": 1.0}),
        (["max_new_tokens=9"], ["--max-new-tokens", "9"], {"max_new_tokens": 9}),
        (["dtype=float32"], ["--dtype", "float32"], {"dtype": "float32"}),
        (["baseline=false", "quick=true"], ["--no-baseline", "--quick"], {"baseline": False, "quick": True}),
        (["proportional=false"], ["--proportional", "false"], {"proportional": False}),
        (["tasks=b, c"], ["-t", "b, c"], {"tasks": ("b", "c")}),
        (["image=x", "image=y=z"], ["--image", "x", "--image", "y=z"], {"image": ["x", "y=z"]}),
    ],
)
def test_words_and_flags_give_the_same_values(words, flag_words, values):
    assert parse(words, OPTIONS) == flags(flag_words) == DEFAULTS | values
    assert OPTIONS["image"].default == []


@pytest.mark.parametrize(
    "key, text",
    [
        *(("ratio", text) for text in ("0", "1.1", "x", "", "nan", "0.5,,0.5", "-0.5")),
        *(("max_new_tokens", text) for text in ("0", "10", "1.5", "-1", "1_0", "")),
        ("dtype", "int8"), ("proportional", "yes"), ("tasks", "a,,b"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_in_both_forms_with_what_is_allowed(key, text, capsys):
    allowed = OPTIONS[key].allowed
    with pytest.raises(ValueError) as error:
        parse([f"{key}={text}"], OPTIONS)
    assert str(error.value).startswith(f"{key}={text!r} is not allowed; allowed: {allowed}")
    assert "invalid literal" not in str(error.value) and "convert" not in str(error.value)
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(SystemExit):
        flags([f"{flag}={text}"])
    assert f"{flag}: {text!r} is not allowed: it must be {allowed}" in capsys.readouterr().err.replace(
        "/-t", ""
    )


@pytest.mark.parametrize(
    "words, reason",
    [
        (["ration=0.9"], "unknown key 'ration' (did you mean 'ratio'?); keys: ratio, max_new_tokens"),
        (["=1"], "unknown key ''"),
        (["fast"], "'fast' is not key=value; keys: ratio"),
        (["ratio=1", "ratio=1"], "ratio is given twice"),
        (["dtype=float23"], "auto | float32: the nearest is 'float32'"),
    ],
)
def test_words_that_name_no_option_are_refused(words, reason):
    with pytest.raises(ValueError) as error:
        parse(words, OPTIONS)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "read, text, value",
    [
        (number(0), "1e3", 1000.0), (number(0), "inf", None), (number(0), "-0.1", None),
        (number(0, 1, above=True), "0", None), (number(0, 1, below=True), "1", None),
        (number(0, 1), "1", 1.0),
        (several(whole(0), distinct=True), "1, 2", (1, 2)), (several(whole(0), distinct=True), "1,1", None),
        *((FIELD_TEXT["amount"][0], text, value) for text, value in
          {"0.5": 0.5, "1.0": 1.0, "64": 64, "1": 1, "0": None, "1.5": None}.items()),
        *((FIELD_TEXT["layers"][0], text, value) for text, value in
          {"8:0.5,16:64": {8: 0.5, 16: 64}, "8:1": {8: 1}, "8": None, "8:0.5,8:0.5": None,
           "x:0.5": None}.items()),
        *((FIELD_TEXT["sides"][0], text, value) for text, value in
          {"9x10": (9, 10), "9": None, "0x9": None, "9x9x9": None}.items()),
        *((FIELD_TEXT["json"][0], text, value) for text, value in
          {'{"a": 1}': {"a": 1}, "[]": None, "{": None, "1": None}.items()),
    ],
)  # fmt: skip
def test_readers_convert_what_is_allowed_and_raise_for_the_rest(read, text, value):
    if value is None:
        with pytest.raises(ValueError):
            read(text)
    else:
        assert read(text) == value and type(read(text)) is type(value)


def test_a_folder_may_be_missing_but_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert folder(str(path)) == str(path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError):
        folder(str(tmp_path / "file"))


def test_help_lists_every_option_with_its_default_in_both_forms(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser, OPTIONS)
    for text in (parser.format_help(), usage(OPTIONS)):
        assert all(option.help in text for option in OPTIONS.values())
        assert "0.9" in text and "share kept; a number in (0, 1]" in text and "model:" in text
    assert helped(["help"], "A script.", OPTIONS) and not helped(["ratio=1"], "A script.", OPTIONS)
    assert capsys.readouterr().out.startswith("A script.\nKeys:\n  ratio=0.9  share kept")


@pytest.mark.parametrize(
    ("default", "text"),
    [(None, ""), ((), ""), ((3, 4), "3,4"), (True, "true"), ({}, "{}"), ({"ratio": 0.5}, '{"ratio": 0.5}')],
)
def test_help_shows_a_default_as_it_is_typed(default, text):
    assert f"  key={text}  of it; any" in usage({"key": Option(default, str, "any", "of it")})


def test_every_field_of_a_config_is_one_option_with_the_same_help():
    options, fields = merge_options(), dataclasses.fields(MergeConfig)
    assert list(options) == [*(f.name for f in fields), "recipe", "merging"]
    for field in fields:
        option = options[field.name]
        assert (option.default, option.help) == (None, field.metadata["help"])
        assert option.group == f"merging, {field.metadata['group']}"
    assert set(FIELD_TEXT) == set(KINDS)
    assert merge_options(help={"ratio": " or 0.9"})["ratio"].help == options["ratio"].help + " or 0.9"


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("ratio", "0.9,0.8", (0.9, 0.8)), ("ratio", "2", None), ("tokens", "64", 64), ("tokens", "0", None),
        ("prefix", "0.5", 0.5), ("prefix", "1", None), ("decoder", "8:0.5,16:64", {8: 0.5, 16: 64}),
        ("resize", "9x10", (9, 10)), ("method", "tome", "tome"),
        ("method", "x", None),
        ("parameters", '{"margin": 0.3}', {"margin": 0.3}), ("early_depth", "0.5", 0.5),
        ("early_depth", "2", None), ("metric", "hidden", "hidden"), ("metric", "values", None),
        ("proportional", "false", False), ("proportional", "no", None), ("depths", "0.5,1", (0.5, 1.0)),
        ("depths", "1,0.5", None), ("depths", "0.5", None), ("depths", "0,0.5,1", None),
        ("prefix_metric", "keys", "keys"), ("prefix_share", "0.5", 0.5),
    ],
)  # fmt: skip
def test_a_field_is_read_and_checked_alike_in_both_forms(field, text, value):
    options, flag = merge_options(), f"--{field.replace('_', '-')}={text}"
    if value is None:
        with pytest.raises(ValueError, match=f"{field}='.*' is not allowed"):
            parse([f"{field}={text}"], options)
        with pytest.raises(SystemExit):
            flags([flag], options)
    else:
        assert parse([f"{field}={text}"], options)[field] == flags([flag], options)[field] == value


@pytest.mark.parametrize(
    "words, config",
    [
        ([], None),
        (["ratio=0.9"], MergeConfig(ratio=0.9)),
        (["prefix=0.5", "size_weighted=false"], MergeConfig(prefix=0.5, size_weighted=False)),
        (["tokens=64", "method=tome", 'merging={"prefix_share": 0.5}'],
         MergeConfig(tokens=64, method="tome", prefix_share=0.5)),
        (["recipe=best", "tokens=20"], MergeConfig.recipe("best", tokens=20)),
        (['merging={"ratio": 0.9}'], MergeConfig(ratio=0.9)),
    ],
)  # fmt: skip
def test_values_make_the_config(words, config):
    assert merge_config(parse(words, merge_options())) == config


@pytest.mark.parametrize(
    "word", ["method=tome", "recipe=best", 'merging={"site": "block"}', "proportional=true"]
)
def test_how_without_how_far_is_refused(word):
    with pytest.raises(ValueError, match="says how to merge but not how far: give one of ratio, tokens"):
        merge_config(parse([word], merge_options()))


def test_a_field_given_twice_is_refused():
    words = ["ratio=0.9", "method=tome", 'merging={"ratio": 0.9, "method": "tome"}']
    with pytest.raises(ValueError, match="method, ratio is given in merging and beside it; give it once"):
        merge_config(parse(words, merge_options()))


def test_several_methods_are_read_where_a_command_compares_them():
    assert parse(["method=tome, pitome"], merge_options(methods=True))["method"] == ("tome", "pitome")
    for word, options, reason in (
        ("method=tome,tome", merge_options(methods=True), "one of them is given twice"),
        ("method=tome,pitome", merge_options(), "the nearest is 'pitome'"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse([word], options)
    assert " | ".join(METHODS) in merge_options()["method"].allowed
