// The adapter of a client in Java: java Adapter SERVICE_CONFIG HOST:PORT.
import com.example.llama2.v1.*;
import com.google.gson.*;
import com.google.protobuf.util.*;
import com.google.rpc.*;
import io.grpc.*;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.FileReader;
import java.util.*;
import java.util.concurrent.TimeUnit;

class Adapter {
  static void call(Channel channel, JsonObject command, GenerateResponse.Builder reply) throws Exception {
    var authorization = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
    var metadata = new Metadata();
    if (command.has("key")) metadata.put(authorization, "Bearer " + command.get("key").getAsString());
    var stub = TextGenerationServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(command.get("deadline_ms").getAsLong(), TimeUnit.MILLISECONDS)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
    var input = GenerateRequest.newBuilder();
    JsonFormat.parser().merge(command.get("request").toString(), input);
    if (command.get("call").getAsString().equals("Generate")) { reply.mergeFrom(stub.generate(input.build())); return; }
    int count = 0, last = command.has("cancel_after") ? command.get("cancel_after").getAsInt() : -1;
    for (var parts = stub.generateStream(input.build()); parts.hasNext(); ) {
      var part = parts.next();
      reply.setResponse(reply.getResponse() + part.getResponse());
      if (part.hasCompletion()) reply.setCompletion(part.getCompletion());
      if (++count == last) throw Status.CANCELLED.asRuntimeException(); // the end of the context cancels the call
    }
    if (!reply.hasCompletion()) throw Status.INTERNAL.asRuntimeException(); // the end of a stream alone proves nothing
  }

  static void readDetails(Throwable error, JsonObject answer, JsonArray fields) throws Exception {
    try {
      for (var detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) answer.addProperty("reason", detail.unpack(ErrorInfo.class).getReason());
        if (detail.is(RetryInfo.class))
          answer.addProperty("retry_after_ms", Durations.toMillis(detail.unpack(RetryInfo.class).getRetryDelay()));
        if (detail.is(BadRequest.class))
          for (var one : detail.unpack(BadRequest.class).getFieldViolationsList()) fields.add(one.getField());
      }
    } catch (IllegalArgumentException trailerOfAnotherType) {} // which hides neither code nor message
  }

  static JsonObject answer(Channel channel, JsonObject command) throws Exception {
    JsonObject answer = new JsonObject();
    JsonArray fields = new JsonArray();
    var reply = GenerateResponse.newBuilder();
    Status status = Status.OK;
    try (var context = Context.current().withCancellation()) {
      context.call(() -> { call(channel, command, reply); return null; });
    } catch (StatusRuntimeException error) {
      status = error.getStatus();
      readDetails(error, answer, fields);
    }
    answer.add("fields", fields);
    answer.addProperty("code", status.getCode().value());
    answer.addProperty("message", status.getDescription());
    answer.addProperty("text", reply.getResponse());
    answer.addProperty("finish_reason", reply.getCompletion().getFinishReasonValue());
    answer.addProperty("seed", Long.toUnsignedString(reply.getCompletion().getSeed()));
    answer.addProperty("neurons", reply.getCompletion().getUsage().getNeurons());
    return answer;
  }

  public static void main(String[] arguments) throws Exception {
    Map<String, ?> config = new Gson().fromJson(new FileReader(arguments[0]), Map.class);
    var channel = Grpc.newChannelBuilder(arguments[1], InsecureChannelCredentials.create())
        .enableRetry().defaultServiceConfig(config).build();
    for (var lines = new Scanner(System.in, "UTF-8"); lines.hasNextLine(); )
      System.out.println(answer(channel, JsonParser.parseString(lines.nextLine()).getAsJsonObject()));
    channel.shutdown();
  }
}
