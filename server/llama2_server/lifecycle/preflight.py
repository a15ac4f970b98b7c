"""Check the settings and the machine before torch is imported (seconds) and the weights are loaded (minutes)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from llama2_server.admission.accounts import AnonymousAuthenticator, ApiKeyAuthenticator, Authenticator
from llama2_server.api.tls import CertificateFiles, RotatingCertificates
from llama2_server.card import ModelCard, load_card
from llama2_server.config.settings import Settings, is_loopback
from llama2_server.configuration_error import ConfigurationError
from llama2_server.lifecycle.checks.checkpoint import check_checkpoint
from llama2_server.lifecycle.checks.data_directory import check_data_directory
from llama2_server.lifecycle.checks.ports import HeldPorts
from llama2_server.lifecycle.checks.stores import check_stores
from llama2_server.receipts.keys import ReceiptKeys, read_keys
from llama2_server.telemetry.telemetry import check_endpoint
from llama2_server.usage.store import Store

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StartupInputs:
    """The content of the files and the stores that the settings name."""

    card: ModelCard
    authenticator: Authenticator
    certificates: RotatingCertificates | None
    """The server's certificate; None for plaintext."""
    receipt_keys: ReceiptKeys | None = None
    """The keys of receipts; None: the service makes no receipts."""
    usage_store: Store | None = None
    """The store that `--usage-url` names, not connected; None: the data directory has the ledger."""
    ports: HeldPorts = field(default_factory=HeldPorts)
    """The ports that the services will listen on."""


def check(settings: Settings) -> StartupInputs:
    """Check everything that is known before the weights load: files, ports, stores, disk, checkpoint and memory.

    The ports stay bound from here on.

    Raises:
        ConfigurationError: the server cannot start; one line per error.
    """
    errors: list[str] = []

    def attempt(work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except ConfigurationError as error:  # the other checks follow, so that one start reports all errors
            errors.append(str(error))
            return None

    card = attempt(lambda: load_card(settings.card))
    authenticator = attempt(lambda: _authenticator(settings))
    certificates = attempt(lambda: read_certificates(settings))
    receipt_keys = attempt(lambda: read_receipt_keys(settings))
    attempt(lambda: check_endpoint(settings.otlp_endpoint))
    ports = attempt(lambda: HeldPorts.of(settings))
    attempt(lambda: check_data_directory(settings))
    if card is not None:
        attempt(partial(check_checkpoint, settings, card))
    attempt(lambda: check_stores(settings))
    if errors or card is None or authenticator is None or ports is None:
        raise ConfigurationError("\n".join(errors))
    return StartupInputs(card, authenticator, certificates, receipt_keys, create_usage_store(settings), ports)


def read_receipt_keys(settings: Settings) -> ReceiptKeys | None:
    """Read the keys of receipts that the settings name; None if they name none.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    return None if settings.receipt_key is None else read_keys(settings.receipt_key, settings.receipt_public_keys)


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
