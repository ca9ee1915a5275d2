"""Onto the Hugging Face Hub: what an export wrote, its card (made of the run's record, where there is one), the recipe.

Everything goes in one commit, so that a repository never holds half of it. Where a push was interrupted, the Hub knows
which large files (or, with hf_xet, which parts of them) have arrived; the next push does not send those again. No state
of it is kept on this machine.
"""

import json
from pathlib import Path

from apo_lora.errors import HubError
from apo_lora.export.gguf import REPORT, read_report
from apo_lora.machine.hub import hub_api
from apo_lora.run.adapter import RECIPE_ON_HUB, AdapterSource
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl
from apo_lora.run.inputs import recorded_start
from apo_lora.run.model_card import What, card_without_run, model_card


def push(
    source: AdapterSource, *, repo: str, private: bool = True, what: What = "adapter", folder: Path | None = None
) -> str:
    """Sends `folder` (of an adapter: its own one) to the repository ORG/NAME, made if need be. Returns its URL.

    Raises HubError in one line; a private push into a public repository is refused before anything is sent.
    """
    _check_name(repo)
    files = _files(source, repo, what, folder)
    from huggingface_hub import CommitOperationAdd

    with hub_api(repo) as hub:
        url = hub.create_repo(repo, private=private, exist_ok=True)
        if private and not hub.repo_info(repo).private:
            raise HubError(
                f"{repo}: the repository is public, but this push is private; nothing was sent. Make it private in its "
                "settings, or push with --public"
            )
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        hub.create_commit(repo, additions, commit_message=f"Upload {what} from apo-lora")
    return str(url)


def _files(source: AdapterSource, repo: str, what: What, folder: Path | None) -> dict[str, Path | bytes]:
    """What lies in the repository afterwards: path in it -> file here, or content."""
    folder = source.folder if what == "adapter" else folder
    if folder is None:
        raise ValueError(f"push(what={what!r}) needs the folder to upload")
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        raise HubError(f"{folder}: contains no file to push; export again")
    onto = read_report(folder).get("onto") if REPORT in files else None
    if source.run:
        card = hub_card(source, source.run, repo, what, onto)
        return {**files, "README.md": card.encode(), RECIPE_ON_HUB: source.recipe.to_yaml().encode()}
    recipe = source.folder / RECIPE_ON_HUB
    beside = {RECIPE_ON_HUB: recipe} if recipe.is_file() else {}
    if what == "adapter" and beside and "README.md" in files:
        return files  # pushed before: its model card knows more than can be written here
    return {**files, "README.md": card_without_run(source, what, repo, onto).encode(), **beside}


def hub_card(source: AdapterSource, run: RunDir, repo: str, what: What, onto: str | None = None) -> str:
    """The model card for the Hub; `onto`: see `model_card`. Raises HubError if the run's record cannot be read."""
    try:
        environment = json.loads(run.environment.read_text(encoding="utf-8"))
        evaluation = json.loads(run.evaluation.read_text(encoding="utf-8")) if run.evaluation.exists() else {}
        steps = max((row["step"] for row in read_jsonl(run.metrics)), default=0)
    except (OSError, ValueError) as error:
        raise HubError(
            f"{run.path}: the run's record, needed for the model card, cannot be read ({error}); restore it"
        ) from None
    facts = {"what": what, "place": repo, "onto": onto, "start": recorded_start(run)}
    return model_card(source.recipe, source.base_name, evaluation, steps, environment, **facts)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"--repo {repo}: {str(error).splitlines()[0]}") from None
    if "/" not in repo:
        raise HubError(f"--repo {repo}: must be ORG/NAME, with your user name or an organization before the slash")
