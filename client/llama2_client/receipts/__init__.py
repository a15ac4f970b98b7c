"""Receipts of replies: keep them in a document, and verify them without a server.

```python
reply = client.generate("Tell me a story about a fox.")
Path("story.receipt").write_text(receipt_document(reply))

statement = verify_receipt(Path("story.receipt").read_bytes(), [read_public_key("receipts.key.pub")])
```

`receipt_document` needs no further packages, `verify_receipt` those of the extra `verify`.
"""

from llama2_client.receipts.document import ReceiptDocument, ReceiptError, receipt_document
from llama2_client.receipts.verification import Statement, read_public_key, verify_receipt

__all__ = [
    "ReceiptDocument",
    "ReceiptError",
    "Statement",
    "read_public_key",
    "receipt_document",
    "verify_receipt",
]
