"""Download a model's tokenizer from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from titanlite.data.train_tokenizer import refuse_existing
from titanlite.errors import ConfigError

# With tokenizer.model, the files that load_tokenizer reads. A model publishes tokenizer.json or tokenizer.model.
_HUGGING_FACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PROBE_TIMEOUT_S = 10.0


def download(repo_id: str, token: str | None, local_dir: str, tokenizer_path: str, force: bool = False) -> list[str]:
    """Download the tokenizer's files, as far as the repository has them.

    Args:
        tokenizer_path: the folder in the repository that holds tokenizer.model; "" for its root.
        force: replace files that are in ``local_dir`` already.

    Returns:
        The paths of the files on this machine.

    Raises:
        ConfigError: a file is there already, no access, no such repository, no tokenizer in it, or no network.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    model = f"{tokenizer_path.rstrip('/')}/tokenizer.model" if tokenizer_path else "tokenizer.model"
    try:
        # A request with a timeout first: without a network, the download alone retries for 20 seconds or more.
        siblings = HfApi().model_info(repo_id, token=token, timeout=_PROBE_TIMEOUT_S).siblings or []
        published = {file.rfilename for file in siblings}
        names = [name for name in (*_HUGGING_FACE_FILES, model) if name in published]
        if "tokenizer.json" not in names and model not in names:
            raise ConfigError(f"{repo_id} has neither tokenizer.json nor {model}; correct --tokenizer_path")
        refuse_existing([Path(local_dir, name) for name in names], force)
        return [hf_hub_download(repo_id, filename=name, local_dir=local_dir, token=token) for name in names]
    except ConfigError:
        raise
    except GatedRepoError as error:
        raise ConfigError(
            f"{repo_id} is gated: ask for access on its page on the hub with your account, then pass --hf_token=... "
            "(an access token from your account's settings)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo_id}: there is no such repository, or it is private; check --repo_id (such as "
            "meta-llama/Llama-3.1-8B) and --hf_token"
        ) from error
    except Exception as error:  # exceptions of the hub library and of its HTTP library
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ConfigError(
            f"{repo_id}: the hub cannot be reached or refuses ({type(error).__name__}: {reason}); check the network, "
            "or train without a download: leave model.tokenizer_path empty for the shipped tokenizer"
        ) from error
