// The adapter of a client in C++: adapter SERVICE_CONFIG HOST:PORT.
#include <fstream>
#include <iostream>

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "llama2/v1/text_generation.grpc.pb.h"

using namespace google::protobuf::util;
using namespace llama2::v1;
using Object = google::protobuf::Map<std::string, google::protobuf::Value>;

grpc::Status Call(TextGenerationService::Stub& stub, Object& command, GenerateResponse& reply) {
  grpc::ClientContext context;
  const std::chrono::milliseconds timeout(static_cast<int>(command["deadline_ms"].number_value()));
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  if (command.contains("key")) context.AddMetadata("authorization", "Bearer " + command["key"].string_value());
  std::string document;
  GenerateRequest request;
  GenerateStreamResponse part;
  MessageToJsonString(command["request"], &document);
  JsonStringToMessage(document, &request);
  if (command["call"].string_value() == "Generate") return stub.Generate(&context, request, &reply);
  const auto stream = stub.GenerateStream(&context, request);
  for (int count = 1; stream->Read(&part); ++count) {
    reply.mutable_response()->append(part.response());
    if (part.has_completion()) *reply.mutable_completion() = part.completion();
    if (count == command["cancel_after"].number_value()) return context.TryCancel(), grpc::Status::CANCELLED;
  }
  return stream->Finish();
}

void Answer(const grpc::Status& end, const GenerateResponse& reply, Object& answer) {
  google::rpc::Status status;
  google::rpc::ErrorInfo info;
  google::rpc::BadRequest invalid;
  google::rpc::RetryInfo retry;
  if (status.ParseFromString(end.error_details()))  // not if the trailer is something else
    for (const auto& any : status.details()) any.UnpackTo(&info) || any.UnpackTo(&invalid) || any.UnpackTo(&retry);
  answer["code"].set_number_value(end.ok() && !reply.has_completion() ? grpc::INTERNAL : end.error_code());
  answer["message"].set_string_value(end.error_message());
  answer["text"].set_string_value(reply.response());
  answer["finish_reason"].set_number_value(reply.completion().finish_reason());
  answer["seed"].set_string_value(std::to_string(reply.completion().seed()));
  answer["neurons"].set_string_value(reply.completion().usage().neurons());
  answer["reason"].set_string_value(info.reason());
  auto& fields = *answer["fields"].mutable_list_value();
  for (const auto& violation : invalid.field_violations()) fields.add_values()->set_string_value(violation.field());
  const auto& delay = retry.retry_delay();
  if (retry.has_retry_delay()) answer["retry_after_ms"].set_number_value(delay.seconds() * 1e3 + delay.nanos() / 1e6);
}

int main(int, char** arguments) {
  std::ifstream config(arguments[1]);
  grpc::ChannelArguments options;
  options.SetServiceConfigJSON({std::istreambuf_iterator<char>(config), {}});
  const auto channel = grpc::CreateCustomChannel(arguments[2], grpc::InsecureChannelCredentials(), options);
  TextGenerationService::Stub stub(channel);
  for (std::string line; std::getline(std::cin, line);) {
    google::protobuf::Struct command, answer;
    GenerateResponse reply;
    JsonStringToMessage(line, &command);
    Answer(Call(stub, *command.mutable_fields(), reply), reply, *answer.mutable_fields());
    MessageToJsonString(answer, &(line = ""));
    std::cout << line << std::endl;
  }
}
