"""Model cards: what the Hub reads of a checkpoint, and the figures of its evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vlm_reward.tasks import train_tasks

_METRICS = {
    "consistency": "consistency",
    "voc": "VOC",
    "voc_wrong": "VOC under wrong sentences",
    "voc_right": "VOC under the right sentence",
    "voc_opposite": "VOC under the opposite sentence",
    "right_of_10": "right sentence of ten",
    "success_auc": "success told from failure (AUC)",
}
_VIEWS = {"average": "mean over the views", "multi": "mean score of the views"}
_TASKS = {"average": "mean of the tasks", "average_training": "mean of training tasks"}
_FIELDS = ("task", "view", "metric", "mean", "low", "high", "n")


def chosen(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of a checkpoint's rows of `eval.benchmark`, those that a card shows: averages, and each task's main two.

    Raises:
        ValueError: a row lacks a field, or there are rows of several checkpoints.
    """
    for row in rows:
        if absent := [name for name in _FIELDS if name not in row]:
            raise ValueError(f"a row of the evaluation lacks {', '.join(absent)}: {dict(row)}")
    if len(names := sorted({row.get("checkpoint", "") for row in rows})) > 1:
        raise ValueError(
            f"the evaluation has rows of several checkpoints ({', '.join(names)}): give those of one"
        )
    return [
        {name: row[name] for name in _FIELDS}
        for row in rows
        if (row["view"] == "average" and row["metric"] in _METRICS)
        or (row["view"] == "multi" and row["metric"] in ("consistency", "voc"))
    ]


def model_card(name: str, facts: Mapping[str, Any], adapter: bool) -> str:
    """A README.md.

    Args:
        name: what `RewardModel.from_pretrained` finds it by.
        facts: what `vlm_reward.json` says; `evaluation` as by `chosen`.
        adapter: whether it is one, or a backbone.
    """
    evaluation, validated = facts.get("evaluation", []), _inside(facts, "validation", "val_voc")
    results = [
        EvalResult(
            task_type="robotics",
            dataset_type="meta-world",
            dataset_name=f"Meta-World, {_TASKS.get(row['task'], row['task'])}",
            dataset_config=row["task"],
            metric_type=row["metric"],
            metric_name=f"{_METRICS[row['metric']]}, {_VIEWS[row['view']]}, %",
            metric_value=round(row["mean"], 1),
        )
        for row in evaluation
    ]
    if validated is not None:
        results.append(
            EvalResult(
                task_type="robotics",
                dataset_type=str(_inside(facts, "protocol", "dataset")),
                dataset_name="held-back trajectories of the training tasks",
                dataset_split="validation",
                metric_type="voc",
                metric_name=f"{_METRICS['voc']}, {_VIEWS['multi']}, %",
                metric_value=round(100 * validated, 1),
            )
        )
    members, reaches = facts.get("members"), "reach" in facts
    base = facts["backbone"] if adapter and not members else None
    head = ModelCardData(
        model_name=name,
        base_model=base,
        library_name="vlm-reward" if members or reaches else "peft" if adapter else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["vlm-reward", "robotics", "reward-model", *(["lora"] if base and not reaches else [])],
        eval_results=results or None,
    )
    judges = facts.get("objective") == "judge"
    start, sentence = ", start=frames[0]" if facts.get("start_weight") else "", "open the drawer"
    does, gives, after = "scores robot camera frames by a sentence: a dense reward", "scores", ""
    if judges:
        does = "tells from camera frames whether what a sentence asks is so already: above a score of 0.3"
        sentence, gives, after = "close the drawer", "is_so", ".mean(1) > 0.3"
    if reaches:
        near = (
            "where the thing a sentence names was"
            if start
            else "what a sentence names: a part of an ensemble"
        )
        does = f"scores robot camera frames by how near the hand is to {near}"
    what = "An ensemble" if members else "A LoRA adapter" if adapter else "A dual encoder"
    body = [
        f"# {name}",
        "",
        f"{'A head on the patches of a frozen backbone' if reaches else what} that {does}.",
        "",
        "```python",
        "from vlm_reward.reward_model import RewardModel",
        "",
        f'model = RewardModel.from_pretrained("{name}")  # or the path of this folder',
        f'{gives} = model.score(frames, "{sentence}"{start}){after}  # uint8 [N, V, H, W, 3] -> '
        f"{'bool [N]' if judges else 'float32 [N, V]'}",
        "```",
    ]
    if start:
        body += [
            "",
            "A frame is scored against the first of its episode (`start`), which wrappers do themselves.",
        ]
        if reaches:
            body += [
                "The thing is where all views agree that it was, the hand where they see it now; the score of the",
                "metres between (1 at 1 cm, 0 at 10, -1 at 1 m) is one for all views. What moves is not followed.",
            ]
    if facts.get("judge"):
        body += [
            "Its judge, in a folder of this one, tells from all views of that frame whether what is asked is so",
            "already; then the score turns its sign, so that to keep it so is best.",
        ]
    if results:
        body += ["", "Figures in per cent, with 95 % bootstrap intervals (`python -m eval.benchmark`); "]
        body[-1] += "those of held-back trajectories by `python -m training.train`:"
        body += ["", "| task | figure | value |", "|---|---|---:|"]
        intervals = [f" [{row['low']:.1f}, {row['high']:.1f}]" for row in evaluation]
        for result, interval in zip(results, [*intervals, ""], strict=False):
            figure = (result.metric_name or "").removesuffix(", %")
            body.append(f"| {result.dataset_name} | {figure} | {result.metric_value}{interval} |")
    if adapter and isinstance(protocol := facts.get("protocol"), Mapping):
        learned = _judge_learned if judges else _reach_learned if reaches else _learned
        body += ["", "## Data and protocol", "", learned(facts, protocol)]
    if members:
        told = f"The mean of the scores of {_code(list(members))}, each by the share below{_unseen(facts)}."
        body += ["", "## Data and protocol", "", told]
    if names := facts.get("averaged"):
        told = f"The mean of the weights of {_code(names)}{_unseen(facts)}."
        body += ["", "## Data and protocol", "", told]
    if adapter and not judges:
        saw = "scenes of training tasks" if reaches else "demonstrations"
        body += ["", "## Use and limits", "", _USE.format(saw=saw)]
    rows = {key: value for key, value in facts.items() if key not in _ELSEWHERE}
    if spec := facts["camera_spec"]:
        rows["cameras"] = spec["cameras"]
        rows["frames"] = f"{spec['height']} x {spec['width']}, render profile {spec['profile']}"
    if rows:
        body += [
            "",
            "## Facts",
            "",
            "| fact | value |",
            "|---|---|",
            *(f"| {key} | {_cell(rows[key])} |" for key in rows),
        ]
    return "\n".join(["---", head.to_yaml(), "---", "", *body, ""])


def _learned(facts: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Where it was learned, and how."""
    tasks, held_back = facts.get("train_tasks", []), facts.get("validation_episodes", [])
    lora = f"r {protocol.get('lora_rank')}, alpha {protocol.get('lora_alpha')}"
    head = ", the pooling attention whole" if protocol.get("head") else ""
    scenes, margin = protocol.get("scenes"), protocol.get("rollout_margin")
    lessons = protocol.get("lesson_weight")
    apart = f", at least {margin} of score for each unit of it" if margin else ""
    told = [
        f"Demonstrations: `{protocol.get('dataset')}`, {len(tasks)} tasks (listed below), {len(held_back)} "
        f"trajectories held back for validation{_unseen(facts)}.",
        f"It went on from `{adapter}`." if (adapter := protocol.get("adapter")) else "",
        "Beside them pictures of the training tasks, ordered by sentences." if scenes else "",
        'Lessons put an instruction between its outcome and "the hand is there".' if lessons else "",
        f"Rollouts of training tasks ordered by their true reward{apart}: {rollouts}."
        if (rollouts := _code(protocol.get("rollouts")))
        else "",
        f"Objective `{facts.get('objective')}`, preset `{facts.get('preset')}`, seed {facts.get('seed')}; "
        f"{protocol.get('sampler')} sampler; peak learning rate {protocol.get('learning_rate')}; LoRA {lora} on",
        f"both towers{head}; the adapter of step {facts.get('trained_steps')}, on the held-back trajectories",
        f"the best by `{protocol.get('select')}`.",
    ]
    return " ".join(filter(None, told))


def _unseen(facts: Mapping[str, Any]) -> str:
    """What is true of those who learned from training tasks alone."""
    own = set(facts.get("train_tasks", [])) <= set(train_tasks())
    return "; no frame and no sentence of a held-out task" if own else ""


def _judge_learned(facts: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Of a judge: where it was learned, and how often it is right."""
    right = facts.get("validation", {})
    so = ", ".join(f"{name} in {100 * part:.1f} %" for name, part in right.items())
    told = [
        f"First and last frames of the demonstrations `{protocol.get('dataset')}` and first frames of "
        f"{_code(protocol.get('starts'))}: {len(facts.get('train_tasks', []))} tasks, no frame and no sentence of "
        f"a held-out one. Seed {facts.get('seed')}, {facts.get('trained_steps')} steps, LoRA r "
        f"{protocol.get('lora_rank')} on both towers, the pooling attention whole.",
        f"On first frames of these tasks that it has not seen it tells right, from all views, what is {so}."
        if so
        else "",
    ]
    return " ".join(filter(None, told))


def _reach_learned(facts: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Of a reach model: where it was learned, and how often it is right."""
    right = facts.get("validation", {})
    told = ", ".join(f"{name} {100 * part:.1f} %" for name, part in right.items())
    what = (
        "Its likeliest place of a thing is no further from the true one than a twentieth of the image"
        if "finder" in facts
        else "Of two images of a scene it tells the nearer hand"
    )
    return (
        f"Scenes of {len(facts.get('train_tasks', []))} tasks and of worlds that no task has "
        f"({_code(protocol.get('scenes'))}), where the simulator knows where hand and things are{_unseen(facts)}. "
        f"Seed {facts.get('seed')}, {facts.get('trained_steps')} steps of {protocol.get('batch_size')} images. "
        f"{what}: {told}."
    )


_USE = (
    "For dense rewards and progress curves from the cameras below; other cameras, sizes and render profiles are "
    "refused. It saw {saw}, so an agent can find states that it overrates: watch true success beside the "
    "learned return. It is no judge of safety. How well it listens, tells success from failure and does on tasks "
    "never seen is in the figures, if there are any above."
)


def _inside(facts: Mapping[str, Any], key: str, name: str) -> Any:
    """What training noted, or None: users may keep other facts under the same key."""
    noted = facts.get(key)
    return noted.get(name) if isinstance(noted, Mapping) else None


_ELSEWHERE = ("format_version", "camera_spec", "projections", "evaluation", "validation", "protocol", "head")


def _code(names: str | Sequence[str] | None) -> str:
    """A name, or several, as code; adapters of an earlier version have a single one."""
    return ", ".join(f"`{name}`" for name in ([names] if isinstance(names, str) else names or ()))


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{key} {item}" for key, item in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
