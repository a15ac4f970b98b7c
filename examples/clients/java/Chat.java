// A chat with llama2-grpc. Each line of the input is one message of the user; Ctrl-C stops the reply in progress.
// Usage: java Chat [SYSTEM_PROMPT]
import com.example.llama2.v1.GenerateRequest;
import com.example.llama2.v1.TextGenerationServiceGrpc;
import com.example.llama2.v1.TextGenerationServiceGrpc.TextGenerationServiceBlockingStub;
import com.google.gson.Gson;
import com.google.protobuf.util.Durations;
import com.google.rpc.BadRequest;
import com.google.rpc.RetryInfo;
import io.grpc.Deadline;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.FileReader;
import java.util.Map;
import java.util.Scanner;
import java.util.concurrent.TimeUnit;
import sun.misc.Signal;

class Chat {
  static volatile boolean replying; // Ctrl-C then interrupts the main thread, and gRPC cancels the call

  /** Prints a reply and returns its text, or null if it is not whole within 120 s. */
  static String printReply(TextGenerationServiceBlockingStub stub, GenerateRequest request) throws Exception {
    for (var deadline = Deadline.after(120, TimeUnit.SECONDS); ; ) {
      String text = "", error = "no completion", fields = "";
      boolean whole = false; // the end of the stream alone proves nothing
      long delay = Long.MAX_VALUE; // in milliseconds; only RetryInfo allows another attempt
      replying = true;
      try {
        for (var parts = stub.withDeadline(deadline).withWaitForReady().generateStream(request); parts.hasNext(); ) {
          var part = parts.next();
          System.out.print(part.getResponse() + (part.hasCompletion() ? "\n" : ""));
          text += part.getResponse();
          whole = part.hasCompletion();
        }
      } catch (StatusRuntimeException failure) {
        error = failure.getStatus().getDescription();
        for (var detail : StatusProto.fromThrowable(failure).getDetailsList()) {
          if (detail.is(RetryInfo.class)) delay = Durations.toMillis(detail.unpack(RetryInfo.class).getRetryDelay());
          if (!detail.is(BadRequest.class)) continue;
          for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList())
            fields += "\n  " + violation.getField() + ": " + violation.getDescription();
        }
      }
      replying = false;
      Thread.interrupted(); // clears the interrupt of the last reply
      if (whole) return text;
      boolean again = text.isEmpty() && delay < deadline.timeRemaining(TimeUnit.MILLISECONDS);
      String retry = again ? "; retrying in " + delay / 1e3 + " s" : "";
      System.err.println((text.isEmpty() ? "" : "\nincomplete: ") + error + retry + fields);
      if (!again) return null;
      Thread.sleep(delay);
    }
  }

  public static void main(String[] arguments) throws Exception {
    Thread main = Thread.currentThread();
    Signal.handle(new Signal("INT"), signal -> { if (replying) main.interrupt(); else System.exit(130); });
    Map<String, String> variables = System.getenv();
    String address = variables.getOrDefault("LLAMA2_ADDRESS", "127.0.0.1:50051");
    Map<String, ?> config = new Gson().fromJson(new FileReader("../service_config.json"), Map.class);
    var plaintext = InsecureChannelCredentials.create(); // with TLS: TlsChannelCredentials.create()
    var channel = Grpc.newChannelBuilder(address, plaintext).enableRetry().defaultServiceConfig(config).build();
    var metadata = new Metadata();
    var authorization = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
    metadata.put(authorization, "Bearer " + variables.getOrDefault("LLAMA2_API_KEY", ""));
    var stub = TextGenerationServiceGrpc.newBlockingStub(channel)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
    var request = GenerateRequest.newBuilder();
    if (arguments.length > 0) request.addMessagesBuilder().setRole("system").setContent(arguments[0]);
    for (var lines = new Scanner(System.in); lines.hasNextLine(); ) {
      request.addMessagesBuilder().setRole("user").setContent(lines.nextLine());
      String text = printReply(stub, request.build());
      if (text == null) request.removeMessages(request.getMessagesCount() - 1);
      else request.addMessagesBuilder().setRole("assistant").setContent(text);
    }
    channel.shutdown();
  }
}
