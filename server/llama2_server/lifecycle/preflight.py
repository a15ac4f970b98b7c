"""Check the settings before torch is imported (seconds) and the weights are loaded (minutes)."""

import logging
from dataclasses import dataclass

from llama2_server.admission.accounts import AnonymousAuthenticator, ApiKeyAuthenticator, Authenticator
from llama2_server.api.tls import CertificateFiles, RotatingCertificates
from llama2_server.card import ModelCard, load_card
from llama2_server.config.settings import Settings, is_loopback
from llama2_server.configuration_error import ConfigurationError
from llama2_server.redis_client import RedisClient
from llama2_server.telemetry.telemetry import check_endpoint
from llama2_server.usage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartupInputs:
    """The content of the files and the stores that the settings name."""

    card: ModelCard
    authenticator: Authenticator
    certificates: RotatingCertificates | None
    """The server's certificate; None for plaintext."""
    usage_store: Store | None = None
    """The store that `--usage-url` names, not connected; None for a file in the data directory."""


def check(settings: Settings) -> StartupInputs:
    """Read the files that the settings name, and check the URLs without connecting to them.

    Raises:
        ConfigurationError: a file or a URL cannot be used.
    """
    card, authenticator, certificates = load_card(settings.card), _authenticator(settings), read_certificates(settings)
    check_endpoint(settings.otlp_endpoint)
    usage_store = create_usage_store(settings)
    if settings.redis_url is not None:
        try:
            RedisClient(settings.redis_url.get_secret_value(), subject="store", timeout_seconds=1.0)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"--redis-url: {error}") from error
    return StartupInputs(card, authenticator, certificates, usage_store)


def create_usage_store(settings: Settings) -> Store | None:
    """Return the store that `--usage-url` names, not connected; None if it names none.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """
    return None if settings.usage_url is None else Store(settings.usage_url.get_secret_value())


def _authenticator(settings: Settings) -> Authenticator:
    if settings.api_keys_file is None:
        return AnonymousAuthenticator()
    return ApiKeyAuthenticator(settings.api_keys_file)


def read_certificates(settings: Settings) -> RotatingCertificates | None:
    """Read and check the certificate that the settings name; None if they name none.

    Raises:
        CertificateError: a file cannot be used.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        if settings.api_keys_file is not None and not is_loopback(settings.listen):
            logger.warning(
                "API keys are sent unencrypted: set --tls-certificate and --tls-key, or terminate TLS in a proxy"
            )
        return None
    return RotatingCertificates(CertificateFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca))
