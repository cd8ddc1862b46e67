"""The example does what it says: its task, its reward, its run and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as python does for the script

from arithmetic_grpo.command import main  # noqa: E402
from arithmetic_grpo.models import small_llama  # noqa: E402
from arithmetic_grpo.task import Problem, make_problems, reward, write_out  # noqa: E402
from arithmetic_grpo.warmup import supervised_batch, warm_up  # noqa: E402

# The task and its reward


@pytest.mark.parametrize(
    ("completion", "earned"),
    [
        ("42", 1.0),
        ("30+12=42", 1.0),
        (" 30+12=42 \n", 1.0),
        ("042", 1.0),
        ("42\n71+15=86", 1.0),
        ("30+12=42.", 1.0),
        ("42=30+12", 0.0),
        ("30+12=421", 0.0),
        ("30+12=-42", 0.0),
        ("30+12=42.5", 0.0),
        ("30+12=4", 0.0),
        ("1\n42", 0.0),
        ("", 0.0),
        ("\n", 0.0),
        ("forty-two", 0.0),
    ],
)
def test_the_reward_asks_for_the_last_number_of_the_first_line(
    completion: str, earned: float
) -> None:
    assert reward(completion, 42) == earned


def test_zero_is_an_answer_like_any_other() -> None:
    assert reward("0", 0) == 1.0
    assert reward("", 0) == 0.0


@pytest.mark.parametrize(
    ("left", "right", "solution"),
    [(17, 25, "30+12=42"), (7, 85, "80+12=92"), (3, 4, "7"), (417, 325, "700+30+12=742")],
)
def test_a_solution_adds_place_by_place(left: int, right: int, solution: str) -> None:
    assert write_out(left, right) == Problem(f"{left}+{right}=", solution, left + right)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_three_sets_are_disjoint_and_their_solutions_earn_the_reward(digits: int) -> None:
    made = make_problems(digits=digits, held_out=20, probe=10, seed=3)
    sets = [
        {problem.prompt for problem in part} for part in (made.train, made.probe, made.held_out)
    ]
    assert [len(part) for part in sets[1:]] == [10, 20]
    assert len(sets[0] | sets[1] | sets[2]) == sum(map(len, sets))
    assert all(reward(p.solution, p.answer) == 1.0 for p in made.train[:500])


def test_a_held_out_set_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="more digits"):
        make_problems(digits=1, held_out=80, probe=20, seed=0)


def test_the_warm_up_learns_solutions_and_not_prompts() -> None:
    _, tokenizer = small_llama(hidden=32, layers=1)
    batch = supervised_batch(
        [write_out(1, 2), write_out(17, 25)],
        tokenizer,
        prefix="",
        end="</s>",
        device=torch.device("cpu"),
    )
    for row, labels, mask, text in zip(
        batch["input_ids"],
        batch["labels"],
        batch["attention_mask"],
        ("1+2=3", "17+25=30+12=42"),
        strict=True,
    ):
        learned = labels[labels >= 0].tolist()
        assert tokenizer.decode(learned) == text[text.index("=") + 1 :] + "</s>"
        assert tokenizer.decode(row[mask.bool()].tolist()) == text + "</s>"
        assert mask.tolist() == sorted(mask.tolist())


def test_the_warm_up_ends_as_soon_as_it_is_good_enough() -> None:
    model, tokenizer = small_llama(hidden=32, layers=1)
    steps: list[int] = []
    measured = iter([0.1, 0.5, 0.9])
    reached = warm_up(
        model,
        tokenizer,
        [write_out(1, 2), write_out(3, 4)],
        steps=9,
        batch=2,
        lr=1e-3,
        target=0.4,
        accuracy=lambda: next(measured),
        check_every=2,
        prefix="",
        end="</s>",
        seed=0,
        report=lambda step, *_: steps.append(step),
    )
    assert reached == 0.5
    assert steps == [1, 2, 3, 4]


# The run


def test_the_quick_run_ends_with_a_line_an_iteration_a_table_and_a_chart(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "grpo.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if " tok/s" in line] == [
        "1/3",
        "2/3",
        "3/3",
    ]
    for said in ("held-out accuracy before", "transformers.generate", "same sampled tokens"):
        assert said in done.stdout
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model, tokenizer = small_llama(hidden=32, layers=2)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("extra", [["--lora"], ["--dtype", "bfloat16"], ["--warmup-steps", "3"]])
def test_any_checkpoint_runs_through_the_same_loop(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    outcome = main(["--quick", "--model", checkpoint, "--out", str(tmp_path), *extra])
    assert len(outcome.history) == 3
    assert ("warm-up    3" in capsys.readouterr().out) is ("--warmup-steps" in extra)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seed", "one"], "--seed"),
        (["--dtype", "float8"], "--dtype"),
        (["--samples", "1"], "--samples is 1"),
        (["--iterations", "0"], "--iterations is 0"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--digits", "1", "--held-out", "90"], "held-out"),
        (["--quick", "--prompts", "1000"], "--prompts 1000"),
        (["--hidden", "30"], "--hidden is 30"),
        (["--unknown"], "--unknown"),
        (["--control", "none"], "--control"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_that_names_it(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in said
    assert said.startswith("grpo.py: error: ")
    assert said.count("\n") == 1


def test_an_output_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "file" / "out")])
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("control", ["frozen", "shuffled"])
def test_a_control_runs_the_same_loop_and_a_frozen_one_ends_as_accurate_as_it_began(
    control: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = main(["--quick", "--control", control, "--out", str(tmp_path)])
    assert f"{control} control" in capsys.readouterr().out
    assert len(outcome.history) == 3
    assert outcome.after == outcome.before or control != "frozen"
