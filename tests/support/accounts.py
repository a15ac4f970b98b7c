"""Accounts for tests that need several, but not their keys."""

from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata


class AccountByHeader(AnonymousAuthenticator):
    """The metadata `account` names the account of a call."""

    def authenticate(self, metadata: Metadata) -> Account:
        return Account(str(dict(metadata).get("account", "a")))


def as_account(account_id: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call of this account."""
    return (("account", account_id),)
