"""Download a model's tokenizer from the Hugging Face hub."""

from __future__ import annotations

from titanlite.errors import ConfigError

# What titanlite.data.load_tokenizer can use; a model publishes at least one of the first and the last.
_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json")
_PROBE_TIMEOUT_S = 10.0


def download(repo_id: str, token: str | None, local_dir: str, tokenizer_path: str) -> list[str]:
    """Download those of the tokenizer's files that the repository has.

    Args:
        tokenizer_path: the folder in the repository that holds tokenizer.model; "" for its root.

    Returns:
        The paths of the files on this machine.

    Raises:
        ConfigError: no access, no such repository, no tokenizer in it, or no network.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    model = f"{tokenizer_path.rstrip('/')}/tokenizer.model" if tokenizer_path else "tokenizer.model"
    try:
        # One request first, because the download alone retries for 20 seconds and more without a network.
        listed = HfApi().model_info(repo_id, token=token, timeout=_PROBE_TIMEOUT_S).siblings or []
        there = {file.rfilename for file in listed}
        wanted = [name for name in (*_HUGGING_FACE_FILES, model) if name in there]
        if "tokenizer.json" not in wanted and model not in wanted:
            raise ConfigError(f"{repo_id} has neither tokenizer.json nor {model}; correct --tokenizer_path")
        return [hf_hub_download(repo_id, filename=name, local_dir=local_dir, token=token) for name in wanted]
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
    except Exception as error:  # the hub library's own, and those of the HTTP library under it
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ConfigError(
            f"{repo_id}: the hub cannot be reached or refuses ({type(error).__name__}: {reason}); check the network, "
            "or train without a download: leave model.tokenizer_path empty for the shipped tokenizer"
        ) from error
