// The adapter of a client in Go: adapter SERVICE_CONFIG HOST:PORT.
package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"time"

	llama2 "example.com/llama2grpc/llama2/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
)

type object map[string]interface{}

func failure(err error, text string) object {
	failed, fields := status.Convert(err), []string{}
	found := object{"code": failed.Code(), "text": text, "message": failed.Message(), "fields": &fields}
	for _, detail := range failed.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			found["reason"] = info.Reason
		} else if retry, ok := detail.(*errdetails.RetryInfo); ok {
			found["retry_after_ms"] = retry.RetryDelay.AsDuration().Milliseconds()
		}
		invalid, _ := detail.(*errdetails.BadRequest) // nil for another type
		for _, violation := range invalid.GetFieldViolations() {
			fields = append(fields, violation.Field)
		}
	}
	return found
}

func answer(ctx context.Context, client llama2.TextGenerationServiceClient, command object) object {
	request, text, count, end := &llama2.GenerateRequest{}, "", 1.0, (*llama2.Completion)(nil)
	document, _ := json.Marshal(command["request"]) // every value of it is valid
	err := protojson.Unmarshal(document, request)
	if err == nil && command["call"] == "Generate" {
		reply, failed := client.Generate(ctx, request)
		text, end, err = reply.GetResponse(), reply.GetCompletion(), failed
	} else if err == nil {
		stream, failed := client.GenerateStream(ctx, request)
		for err = failed; err == nil; count++ {
			var part *llama2.GenerateStreamResponse
			if part, err = stream.Recv(); part.GetCompletion() != nil {
				end = part.Completion
			}
			if text += part.GetResponse(); count == command["cancel_after"] { // main cancels the call
				return object{"code": "CANCELLED", "text": text}
			}
		}
	}
	if err != nil && err != io.EOF {
		return failure(err, text)
	} else if end == nil { // the end of a stream alone proves nothing
		return object{"code": "INTERNAL", "text": text, "message": "the reply has no completion"}
	}
	neurons := end.GetUsage().GetNeurons()
	return object{"code": "OK", "text": text, "finish_reason": end.FinishReason, "seed": end.Seed, "neurons": neurons}
}

func main() {
	config, _ := os.ReadFile(os.Args[1]) // Dial returns no channel for an empty one, and the first call panics
	channel, _ := grpc.Dial(os.Args[2], grpc.WithInsecure(), grpc.WithDefaultServiceConfig(string(config)))
	input, output := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for command := (object{}); input.Decode(&command) == nil; command = nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(command["deadline_ms"].(float64)*1e6))
		if key, ok := command["key"].(string); ok {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
		}
		output.Encode(answer(ctx, llama2.NewTextGenerationServiceClient(channel), command))
		cancel()
	}
}
