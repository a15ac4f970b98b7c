"""The card and the messages of the validation tests."""

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import load_card

CARD = load_card("llama-2-7b-chat-fp16")


def user(content: str) -> pb.ChatMessage:
    return pb.ChatMessage(role="user", content=content)


def assistant(content: str) -> pb.ChatMessage:
    return pb.ChatMessage(role="assistant", content=content)
