"""Monthly budgets of accounts: at admission the highest price of a request is reserved, until its record is stored."""
