-- Adds two features to Envoy's filters: one URL for both output forms of the card, and one JSON format,
-- google.rpc.Status, for all errors of Envoy and of the service.

local GENERATE = "/v1/generate"

-- gRPC codes of Envoy's own errors, by HTTP status.
local CODES = { ["400"] = 3, ["404"] = 12, ["405"] = 12, ["413"] = 8, ["415"] = 3, ["503"] = 14, ["504"] = 4 }
-- Interval of Envoy's health checks, in seconds.
local RETRY_AFTER = "5"
-- Descriptions of wrong types, similar to the service's messages.
local TYPES = {
  TYPE_STRING = "must be of type string",
  TYPE_BOOL = "must be of type boolean",
  TYPE_DOUBLE = "must be of type number",
  TYPE_INT32 = "must be of type integer, in 32 bits",
  TYPE_UINT64 = "must be of type integer, not negative, in 64 bits",
}

-- The transcoder's message has the field and quotes its value or parts of the body. Because these are the client's data,
-- only the field and its type are returned.
local function wrong_type(text)
  local parent, name = text:match("^([%w_%.%[%]]*): invalid value Starting an object on a scalar field for type ([%w_]+)$")
  if name then
    return parent == "" and name or parent .. "." .. name, "must not be an object"
  end
  local field, kind = text:match("^([%w_%.%[%]]+): invalid value .* for type (%S+)$")
  if field then
    return field, TYPES[kind] or "must hold objects"
  end
  return "", "the body must be one JSON object with the fields of the request, each with the correct type"
end

local function status_json(http_status, text)
  local details = ""
  local message = text:gsub('[%c"\\\127-\255]', " "):gsub(" +$", "")
  if http_status == "400" then
    local field, description = wrong_type(text)
    message = field == "" and description or field .. ": " .. description
    details = string.format(
      '{"@type":"type.googleapis.com/google.rpc.BadRequest","field_violations":[{"field":"%s","description":"%s"}]}',
      field, description)
  end
  return string.format('{"code":%d,"message":"%s","details":[%s]}', CODES[http_status] or 2, message, details)
end

function envoy_on_request(request)
  local headers = request:headers()
  local content_type = headers:get("content-type") or ""
  if content_type:find("^application/grpc") then
    return
  end
  if headers:get(":method") ~= "POST" then
    request:respond({ [":status"] = "405", ["allow"] = "POST" }, "POST JSON to " .. GENERATE .. ", or call by gRPC")
    return
  end
  -- Browsers let web pages post text and forms to any address, but JSON only if CORS allows it.
  if not content_type:find("^application/json") then
    request:respond({ [":status"] = "415" }, "send JSON, with content-type: application/json")
    return
  end
  if headers:get(":path"):match("^[^?]*") == GENERATE then
    local body = request:streamInfo():dynamicMetadata():get("llama2") or {}
    local method = body["stream"] == true and "GenerateStream" or "Generate"
    headers:replace(":path", "/llama2.v1.TextGenerationService/" .. method)
  end
end

function envoy_on_response(response)
  local headers = response:headers()
  local pushback = headers:get("grpc-retry-pushback-ms")
  if pushback and tonumber(pushback) >= 0 then
    headers:replace("retry-after", tostring(math.ceil(tonumber(pushback) / 1000)))
  end
  -- Replies of the service are JSON, events or gRPC; plain text comes from Envoy.
  if headers:get("content-type") == "text/plain" then
    local http_status = headers:get(":status")
    headers:replace("content-type", "application/json")
    if http_status == "503" then
      headers:replace("retry-after", RETRY_AFTER)
    end
    local body = response:body(true)
    local length = body:setBytes(status_json(http_status, tostring(body:getBytes(0, body:length()))))
    response:headers():replace("content-length", tostring(length)) -- `headers` is invalid after the wait for the body
  end
end
