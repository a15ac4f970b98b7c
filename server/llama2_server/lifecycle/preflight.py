"""What can be refused before torch is imported (seconds) and the weights are loaded (minutes)."""

from llama2_server.admission.accounts import AnonymousAuthenticator, ApiKeyAuthenticator, Authenticator
from llama2_server.api.tls import CertificateFiles
from llama2_server.card import ModelCard, load_card
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.redis_client import RedisClient
from llama2_server.telemetry.telemetry import check_endpoint
from llama2_server.usage.database import create_engine


def check(settings: Settings) -> None:
    """Read the files and URLs that the settings name; nothing is connected to.

    Raises:
        ConfigurationError: with one line for each problem.
    """
    read_card_and_accounts(settings)
    check_endpoint(settings.otlp_endpoint)
    if settings.tls_certificate is not None and settings.tls_key is not None:
        CertificateFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca).read()
    if settings.usage_url is not None:
        create_engine(settings.usage_url.get_secret_value())
    if settings.redis_url is not None:
        try:
            RedisClient(settings.redis_url.get_secret_value(), subject="store", timeout_seconds=1.0)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"redis_url: {error}") from error


def read_card_and_accounts(settings: Settings) -> tuple[ModelCard, Authenticator]:
    """Who may ask for what.

    Raises:
        CardError, KeysFileError: each with one line for the operator.
    """
    accounts = (
        AnonymousAuthenticator() if settings.api_keys_file is None else ApiKeyAuthenticator(settings.api_keys_file)
    )
    return load_card(settings.card), accounts
