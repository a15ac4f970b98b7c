// A chat with llama2-grpc. Each line of the input is one message of the user; Ctrl-C stops the reply in progress.
// Usage: chat [SYSTEM_PROMPT]
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/signal"
	"time"

	llama2 "example.com/llama2grpc/llama2/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// A reply is whole if it is complete within 120 s, which include waiting for the server and for the quota.
func printReply(client llama2.TextGenerationServiceClient, messages []*llama2.ChatMessage) (text string, whole bool) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 120*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+os.Getenv("LLAMA2_API_KEY"))
	for {
		call, err := client.GenerateStream(ctx, &llama2.GenerateRequest{Messages: messages}, grpc.WaitForReady(true))
		for err == nil {
			var part *llama2.GenerateStreamResponse
			part, err = call.Recv() // nil at the end, which alone proves nothing
			fmt.Print(part.GetResponse())
			text, whole = text+part.GetResponse(), whole || part.GetCompletion() != nil
		}
		if whole {
			fmt.Println()
			return text, true
		}
		failure, fields, delay := status.Convert(err), "", time.Hour // only RetryInfo allows another attempt
		for _, detail := range failure.Details() {
			if info, ok := detail.(*errdetails.RetryInfo); ok {
				delay = info.RetryDelay.AsDuration()
			}
			request, _ := detail.(*errdetails.BadRequest) // nil for another type
			for _, violation := range request.GetFieldViolations() {
				fields += fmt.Sprintf("  %s: %s\n", violation.Field, violation.Description)
			}
		}
		if deadline, _ := ctx.Deadline(); text != "" || time.Until(deadline) < delay {
			fmt.Fprintf(os.Stderr, "\nincomplete: %s\n%s", failure.Message(), fields)
			return text, false
		}
		fmt.Fprintf(os.Stderr, "%s; retrying in %v s\n", failure.Message(), delay.Seconds())
		wait, done := context.WithTimeout(ctx, delay)
		<-wait.Done()
		done()
	}
}

func main() {
	address, messages := "127.0.0.1:50051", []*llama2.ChatMessage{}
	fmt.Sscan(os.Getenv("LLAMA2_ADDRESS"), &address)   // keeps the default if the variable is empty
	config, _ := os.ReadFile("../service_config.json") // Dial rejects an empty one
	plaintext := grpc.WithInsecure()                   // with TLS: grpc.WithTransportCredentials(credentials.NewTLS(nil))
	channel, err := grpc.Dial(address, plaintext, grpc.WithDefaultServiceConfig(string(config)))
	if err != nil {
		panic(err)
	}
	client := llama2.NewTextGenerationServiceClient(channel)
	message := func(role, text string) *llama2.ChatMessage { return &llama2.ChatMessage{Role: &role, Content: &text} }
	for _, prompt := range os.Args[1:] {
		messages = append(messages, message("system", prompt))
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		conversation := append(messages, message("user", lines.Text()))
		if text, whole := printReply(client, conversation); whole {
			messages = append(conversation, message("assistant", text))
		}
	}
}
