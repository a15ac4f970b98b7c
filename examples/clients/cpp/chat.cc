// A chat with llama2-grpc. Each line of the input is one message of the user; Ctrl-C stops the reply in progress.
// Usage: chat [SYSTEM_PROMPT]
#include <csignal>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <thread>

#include <grpcpp/grpcpp.h>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "llama2/v1/text_generation.grpc.pb.h"

using namespace llama2::v1;
std::shared_ptr<grpc::ClientContext> call;  // the reply in progress, or null; two threads use it

// Returns the text of a reply, or nothing if it is not whole within 120 s.
std::optional<std::string> PrintReply(TextGenerationService::Stub& stub, const GenerateRequest& request) {
  for (const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(120);;) {
    const auto context = std::make_shared<grpc::ClientContext>();
    context->set_deadline(deadline);
    context->set_wait_for_ready(true);
    if (const char* key = getenv("LLAMA2_API_KEY")) context->AddMetadata("authorization", std::string("Bearer ") + key);
    std::atomic_store(&call, context);
    std::string text;
    bool whole = false, again = false;
    const auto stream = stub.GenerateStream(context.get(), request);
    for (GenerateStreamResponse part; stream->Read(&part); whole = part.has_completion())
      text += part.response(), std::cout << part.response() << std::flush;
    const grpc::Status end = stream->Finish();  // alone, it does not prove that the reply is whole
    std::atomic_store(&call, {});
    if (whole) return std::cout << std::endl, text;
    google::rpc::Status status;
    google::rpc::BadRequest invalid;
    google::rpc::RetryInfo retry;
    status.ParseFromString(end.error_details());
    for (const auto& detail : status.details()) detail.UnpackTo(&invalid), again |= detail.UnpackTo(&retry);
    const std::chrono::duration<double> delay(retry.retry_delay().seconds() + retry.retry_delay().nanos() / 1e9);
    again &= text.empty() && std::chrono::system_clock::now() + delay < deadline;
    std::cerr << (text.empty() ? "" : "\nincomplete: ") << end.error_message();
    if (again) std::cerr << "; retrying in " << delay.count() << " s";
    for (const auto& bad : invalid.field_violations()) std::cerr << "\n  " << bad.field() << ": " << bad.description();
    std::cerr << std::endl;
    if (!again) return std::nullopt;
    std::this_thread::sleep_for(delay);
  }
}

int main(int argc, char** argv) {
  sigset_t interrupts;
  sigemptyset(&interrupts);
  sigaddset(&interrupts, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupts, nullptr);  // in all threads: a signal handler must not call gRPC
  std::thread([interrupts] {
    for (int signal; sigwait(&interrupts, &signal) == 0;)
      if (const auto running = std::atomic_load(&call)) running->TryCancel();
      else _exit(130);
  }).detach();
  std::ifstream config("../service_config.json");
  grpc::ChannelArguments options;
  options.SetServiceConfigJSON({std::istreambuf_iterator<char>(config), {}});
  const char* address = getenv("LLAMA2_ADDRESS");
  TextGenerationService::Stub stub(grpc::CreateCustomChannel(  // with TLS: grpc::SslCredentials({})
      address ? address : "127.0.0.1:50051", grpc::InsecureChannelCredentials(), options));
  GenerateRequest request;
  const auto add = [&request](const char* role, const std::string& content) {
    request.add_messages()->set_role(role);
    request.mutable_messages()->rbegin()->set_content(content);
  };
  if (argc > 1) add("system", argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    add("user", line);
    if (const auto text = PrintReply(stub, request)) add("assistant", *text);
    else request.mutable_messages()->RemoveLast();
  }
}
