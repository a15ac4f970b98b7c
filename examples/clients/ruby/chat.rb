# A chat with llama2-grpc. Each line of the input is one message of the user; Ctrl-C stops the reply in progress.
# Usage: ruby chat.rb [SYSTEM_PROMPT]
$LOAD_PATH.unshift("#{__dir__}/build")
require "google/protobuf/well_known_types"
require "google/rpc/error_details_pb"
require "llama2/v1/text_generation_services_pb"
require "securerandom"
$stdout.sync = true # prints each piece at once

STUB = Llama2::V1::TextGenerationService::Stub.new(
  ENV.fetch("LLAMA2_ADDRESS", "127.0.0.1:50051"),
  :this_channel_is_insecure, # with TLS: GRPC::Core::ChannelCredentials.new
  channel_args: { "grpc.service_config" => File.read("#{__dir__}/../service_config.json") },
)
REQUEST = Llama2::V1::GenerateRequest
METADATA = ENV["LLAMA2_API_KEY"].to_s.empty? ? {} : { "authorization" => "Bearer #{ENV["LLAMA2_API_KEY"]}" }
call = nil # the reply in progress
Signal.trap("INT") { call ? call.cancel : exit!(130) }

def detail(error, type) # the google.rpc detail of this type, or nil
  packed = error.to_rpc_status&.details&.find { |any| any.is(type) }
  packed&.unpack(type)
end

print_reply = lambda do |messages| # returns its text, or nil if it is not whole within 120 s
  deadline = Time.now + 120
  text, key = +"", SecureRandom.uuid # all attempts with the key are one call, with one price
  loop do
    completion = nil
    position = text.length # the server continues after these characters
    fields = { messages: messages, idempotency_key: key, resume_after_characters: position }
    call = STUB.generate_stream(REQUEST.new(**fields), deadline: deadline, metadata: METADATA, return_op: true)
    call.execute.each do |part|
      raise GRPC::DataLoss, "the server cannot resume" if part.resumed_after_characters != position
      position = 0
      print part.response
      text << part.response
      completion = part.completion
    end
    raise GRPC::DataLoss, "the stream ended without a completion" unless completion # its end alone proves nothing
    puts
    return text
  rescue GRPC::BadStatus => error
    call = nil
    delay = detail(error, Google::Rpc::RetryInfo)&.retry_delay # without it, a server that restarts gets one second
    wait = delay ? delay.to_f : 1.0
    again = (delay || error.is_a?(GRPC::Unavailable)) && Time.now + wait < deadline
    mark = "\n#{again ? "broken" : "incomplete"}: " unless text.empty?
    warn "#{mark}#{error.details}#{"; retrying in #{wait} s" if again}"
    detail(error, Google::Rpc::BadRequest)&.field_violations&.each { |bad| warn "  #{bad.field}: #{bad.description}" }
    return nil unless again
    sleep wait
  ensure
    call = nil
  end
end

chat = Thread.new do # a thread that reads a stream does not run the handler of Ctrl-C: the main thread does
  messages = ARGV[0] ? [Llama2::V1::ChatMessage.new(role: "system", content: ARGV[0])] : []
  while (line = $stdin.gets(chomp: true))
    user = Llama2::V1::ChatMessage.new(role: "user", content: line)
    text = print_reply.call([*messages, user])
    messages += [user, Llama2::V1::ChatMessage.new(role: "assistant", content: text)] if text
  end
end
chat.join
