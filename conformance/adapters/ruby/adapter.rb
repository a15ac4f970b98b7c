# The adapter of a client in Ruby: ruby adapter.rb BUILD HOST:PORT. BUILD has the generated code.
$LOAD_PATH.unshift(ARGV[0])
require "json"
require "google/protobuf/well_known_types"
require "google/rpc/error_details_pb"
require "llama2/v1/text_generation_services_pb"
$stdout.sync = true

config = File.read("#{__dir__}/../../../examples/clients/service_config.json")
STUB = Llama2::V1::TextGenerationService::Stub.new(
  ARGV[1], :this_channel_is_insecure, channel_args: { "grpc.service_config" => config },
)
CODES = GRPC::Core::StatusCodes.constants.to_h { |name| [GRPC::Core::StatusCodes.const_get(name), name.to_s] }

def detail(error, type) # the google.rpc detail of this type; nil if the trailer is not a google.rpc.Status
  error.to_rpc_status&.details&.find { |any| any.is(type) }&.unpack(type)
rescue Google::Protobuf::ParseError
  nil
end

def failure(error, text)
  delay = detail(error, Google::Rpc::RetryInfo)&.retry_delay
  fields = detail(error, Google::Rpc::BadRequest)&.field_violations.to_a.map(&:field).sort
  {
    code: CODES.fetch(error.code, "UNKNOWN"), text: text, message: error.details.dup.force_encoding("UTF-8"),
    reason: detail(error, Google::Rpc::ErrorInfo)&.reason.to_s, fields: fields,
    retry_after_ms: delay && (delay.to_f * 1000).round,
  }
end

def success(text, completion) # the end of a stream alone proves nothing
  return { code: "INTERNAL", text: text, message: "the reply has no completion" } unless completion

  finish = completion.finish_reason.to_s.delete_prefix("FINISH_REASON_")
  { code: "OK", text: text, finish_reason: finish, seed: completion.seed.to_s, neurons: completion.usage&.neurons.to_s }
end

def answer(command)
  request = Llama2::V1::GenerateRequest.decode_json(JSON.generate(command["request"]))
  metadata = command["key"] ? { "authorization" => "Bearer #{command["key"]}" } : {}
  options = { deadline: Time.now + command.fetch("deadline_ms", 20_000) / 1000.0, metadata: metadata }
  text = +""
  completion = nil
  if command["call"] == "Generate"
    reply = STUB.generate(request, **options)
    return success(reply.response, reply.completion)
  end
  call = STUB.generate_stream(request, **options, return_op: true)
  call.execute.each.with_index(1) do |part, count|
    text << part.response
    completion = part.completion || completion
    next unless count == command["cancel_after"]

    call.cancel
    return { code: "CANCELLED", text: text }
  end
  success(text, completion)
rescue GRPC::BadStatus => error
  failure(error, text.to_s)
end

$stdin.each_line { |line| puts JSON.generate(answer(JSON.parse(line))) }
