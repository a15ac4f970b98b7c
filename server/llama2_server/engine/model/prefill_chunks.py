"""The size of a prefill chunk by card: one that fills the card, but delays the other sequences by about 50 ms at most.

The table is fixed. A measurement at startup would give other chunks, and therefore other bits, after some restarts.
"""

CHUNK_SECONDS = 0.05
OPERATIONS_PER_PARAMETER = 2  # one multiplication and one addition per weight and token
# Expected matmul rates in 10^12 operations per second: 60% of NVIDIA's published dense float16 peak with sums in
# float32. The first entry whose words are in torch's name of the card counts. One card was measured: on an H200,
# products of matrices of 8,192 x 8,192 reach 744, and a chunk of 2,048 tokens of the 7B takes 57 ms.
MATMUL_TERAOPS = {
    "B200": 1350,
    "GH200": 590,
    "H200": 590,
    "H100 PCIe": 450,
    "H100 NVL": 500,
    "H100": 590,
    "A100": 185,
    "A30": 95,
    "A10": 75,
    "A10G": 42,
    "L40": 110,
    "L40S": 215,
    "L4": 70,
    "V100": 75,
    "T4": 38,
    "RTX PRO 6000": 300,
    "RTX 6000 Ada": 215,
    "RTX 5090": 125,
    "RTX 4090": 100,
    "RTX 3090": 42,
}
DEFAULT_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 64, 2048


def cuda_chunk_tokens(card: str, parameters: int) -> int:
    """Return the number of prompt tokens per prefill step, a power of two.

    Args:
        card: torch's name of the card, such as "NVIDIA H100 80GB HBM3".
        parameters: the number of weights of the model.
    """
    words = f" {card.replace('-', ' ')} "
    teraops = next((rate for name, rate in MATMUL_TERAOPS.items() if f" {name} " in words), None)
    if teraops is None:
        return DEFAULT_CHUNK_TOKENS
    tokens = int(CHUNK_SECONDS * teraops * 1e12 / (OPERATIONS_PER_PARAMETER * parameters))
    power_of_two = 1 << max(tokens.bit_length() - 1, 0)
    return min(max(power_of_two, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
