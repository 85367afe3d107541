"""`mmjax describe` prints the keys of a place in a config."""

from __future__ import annotations

from mains import refused, run

from mmjax import describe


def test_it_prints_type_default_bounds_class_and_meaning() -> None:
    ended = run(describe.main, "optimizer")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("optimizer (mmjax.optim.config)\n")
    assert (
        "\n  learning_rate: float, default 0.001; at least 0; schedule\n      the peak.\n"
        in ended.out
    )


def test_it_lists_the_names_to_choose_from_and_describes_the_one_chosen() -> None:
    choice = run(describe.main, "tasks.T.objective").out
    assert "\n  contrastive\n" in choice and "\n  masked_image\n" in choice
    chosen = run(describe.main, "tasks.T.objective", "contrastive").out
    assert "\n  modalities: list of str, required; schedule\n" in chosen
    by_config = run(describe.main, "tasks.image_text.objective", "--config=quickstart").out
    assert by_config.splitlines()[1:] == chosen.splitlines()[1:]


def test_a_single_key_is_described_alone() -> None:
    ended = run(describe.main, "optimizer.accumulate")
    assert "accumulate: int, default 1; at least 1; structural" in ended.out
    assert "warmup" not in ended.out


def test_an_unknown_key_names_the_nearest() -> None:
    assert "no key 'objectiv'. Did you mean 'objective'?" in refused(
        describe.main, "tasks.T.objectiv"
    )
