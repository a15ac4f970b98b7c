"""Accounts for tests that need several accounts, but no keys."""

from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata


class AccountByHeader(AnonymousAuthenticator):
    """An authenticator that trusts the metadata `account`."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the account that the metadata names, or the account `a`."""
        return Account(str(dict(metadata).get("account", "a")))


def as_account(account_id: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call from this account."""
    return (("account", account_id),)
