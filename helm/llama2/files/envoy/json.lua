-- Adds to Envoy's filters: one URL for both output forms of the card, one JSON format for all errors of Envoy and of the
-- service (google.rpc.Status), and the URLs of the hosted endpoint, whose errors have the host's format.

local GENERATE = "/v1/generate"

-- gRPC codes of Envoy's own errors, by HTTP status.
local CODES = { ["400"] = 3, ["404"] = 12, ["405"] = 12, ["413"] = 8, ["415"] = 3, ["503"] = 14, ["504"] = 4 }
-- HTTP status, code and message of the hosted endpoint for errors that the service does not format, by HTTP status.
local HOSTED_ERRORS = {
  ["404"] = { "404", 7003, "no such path; POST to /client/v4/accounts/{account_id}/ai/run/{model}" },
  ["413"] = { "413", 3006, "the request has too many bytes; send a shorter one" },
  ["503"] = { "503", 503, "no server is available; retry" },
  ["504"] = { "408", 3007, "the deadline passed" },
}
-- Content types that the hosted endpoint accepts with a key, next to JSON.
local HOSTED_TYPES = { [""] = true, ["text/plain"] = true, ["application/x-www-form-urlencoded"] = true }
-- Interval of Envoy's health checks, in seconds.
local RETRY_AFTER = "5"
local CONNECT = "the Connect protocol is not supported; call by gRPC-Web (createGrpcWebTransport), gRPC, or JSON without "
  .. "the header connect-protocol-version"
-- Descriptions of wrong types, similar to the service's messages.
local TYPES = {
  TYPE_STRING = "must be of type string",
  TYPE_BOOL = "must be of type boolean",
  TYPE_DOUBLE = "must be of type number",
  TYPE_INT32 = "must be of type integer, in 32 bits",
  TYPE_UINT64 = "must be of type integer, not negative, in 64 bits",
}

-- Fields with one value. For an array in such a field the transcoder names only the message that has the field, so the
-- request is searched for it. A text cannot match, because JSON escapes the quotes in it.
local SINGLE = {
  message = { "content", "role" },
  request = { "prompt", "raw", "stream", "max_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "no_cache" },
}

local function first_array(body, names)
  local first, found
  for _, name in ipairs(names) do
    local at = body:find('"' .. name .. '"%s*:%s*%[')
    if at and (not first or at < first) then
      first, found = at, name
    end
  end
  return found or ""
end

-- The transcoder's message has the field and quotes its value or parts of the body. Because these are the client's data,
-- only the field and its type are returned.
local function wrong_type(text, arrays)
  local parent, name = text:match("^([%w_%.%[%]]*): invalid value Starting an object on a scalar field for type ([%w_]+)$")
  if name then
    return parent == "" and name or parent .. "." .. name, "must not be an object"
  end
  local field, kind = text:match("^([%w_%.%[%]]+): invalid value .* for type (%S+)$")
  if field then
    return field, TYPES[kind] or "must hold objects"
  end
  local message = text:match("^([%w_%.%[%]]*): Proto field is not repeating, cannot start list")
  local array = message and arrays[message == "" and "request" or "message"] or ""
  if array ~= "" then
    return message == "" and array or message .. "." .. array, "must not be an array"
  end
  return "", "the body must be one JSON object with the fields of the request, each with the correct type"
end

local function plain(text)
  return (text:gsub('[%c"\\\127-\255]', " "):gsub(" +$", ""))
end

local function status_json(http_status, text, arrays)
  local details = ""
  local message = plain(text)
  if http_status == "400" then
    local field, description = wrong_type(text, arrays)
    message = field == "" and description or field .. ": " .. description
    details = string.format(
      '{"@type":"type.googleapis.com/google.rpc.BadRequest","field_violations":[{"field":"%s","description":"%s"}]}',
      field, description)
  end
  return string.format('{"code":%d,"message":"%s","details":[%s]}', CODES[http_status] or 2, message, details)
end

local function replace_body(response, text)
  local body = response:body(true)
  local length = body:setBytes(text)
  response:headers():replace("content-length", tostring(length)) -- headers read before are invalid after the wait
end

-- Sets the status and the body of an error of the hosted endpoint. They come from the service's trailers or, for an error of
-- Envoy or of gRPC, from the table.
local function hosted_error(response, http_status)
  local headers = response:headers()
  local status, text = headers:get("llama2-http-status"), headers:get("llama2-http-body")
  if not status then
    local known = HOSTED_ERRORS[http_status]
    local code, message
    if known then
      status, code, message = known[1], known[2], known[3]
    else
      local body = response:body(true)
      headers = response:headers()
      status, code, message = http_status, tonumber(http_status), plain(tostring(body:getBytes(0, body:length())))
    end
    text = string.format('{"result":null,"success":false,"errors":[{"code":%d,"message":"%s"}],"messages":[]}', code, message)
  end
  headers:replace(":status", status)
  headers:replace("content-type", "application/json")
  for _, name in ipairs({ "llama2-http-status", "llama2-http-body", "grpc-status", "grpc-message", "grpc-status-details-bin",
    "grpc-retry-pushback-ms" }) do
    headers:remove(name)
  end
  replace_body(response, text)
end

-- A call by the Connect protocol gets an error in the protocol's format. connect-web shows the message of a streamed call only
-- if the HTTP status is 200 and the error is in the stream's last message: flag 2, four bytes of length, JSON.
local function connect_error(response, content_type, message)
  local text = string.format('{"code":"unimplemented","message":"%s"}', message)
  if content_type:find("^application/connect") then
    local headers = response:headers()
    headers:replace(":status", "200")
    headers:replace("content-type", content_type)
    text = string.format('{"error":%s}', text)
    text = string.char(2, 0, 0, math.floor(#text / 256), #text % 256) .. text
  end
  replace_body(response, text)
end

local function reject(request, http_status, text, header, value)
  request:respond({ [":status"] = http_status, [header or "x-content-type-options"] = value or "nosniff" }, text)
end

function envoy_on_request(request)
  local headers = request:headers()
  local content_type = (headers:get("content-type") or ""):lower()
  if content_type:find("^application/grpc") then
    return
  end
  local path = headers:get(":path"):match("^[^?]*")
  local hosted = request:metadata():get("hosted")
  local metadata = request:streamInfo():dynamicMetadata()
  if content_type:find("^application/connect") or headers:get("connect-protocol-version") then
    metadata:set("llama2", "connect", content_type)
    return reject(request, "415", CONNECT)
  end
  if headers:get(":method") ~= "POST" then
    return reject(request, "405", "POST JSON to " .. GENERATE .. ", or call by gRPC", "allow", "POST")
  end
  -- Browsers let web pages post text and forms to any address, but JSON or an API key only if CORS allows it. Applications
  -- of the hosted endpoint send JSON also under other types, such as curl's default, always with a key.
  local type = content_type:match("^[^; ]*")
  local from_host = hosted and headers:get("authorization") and (HOSTED_TYPES[type] or type:find("^%a+/json$"))
  if type ~= "application/json" and not from_host then
    return reject(request, "415", "send JSON, with content-type: application/json")
  end
  local stream = (metadata:get("llama2") or {})["stream"] == true
  if path == GENERATE then
    local body = request:body()
    local text = body and tostring(body:getBytes(0, body:length())) or ""
    metadata = request:streamInfo():dynamicMetadata() -- objects from before the wait are invalid
    for kind, names in pairs(SINGLE) do
      metadata:set("llama2", kind, first_array(text, names))
    end
    request:headers():replace(":path", "/llama2.v1.TextGenerationService/" .. (stream and "GenerateStream" or "Generate"))
  elseif hosted then
    headers:replace(":path", stream and path .. ":stream" or path)
  end
end

function envoy_on_response(response)
  local headers = response:headers()
  local http_status = headers:get(":status")
  local pushback = headers:get("grpc-retry-pushback-ms")
  if pushback and tonumber(pushback) >= 0 then
    headers:replace("retry-after", tostring(math.ceil(tonumber(pushback) / 1000)))
  end
  -- Replies of the service are JSON, events or gRPC; plain text comes from Envoy.
  local from_envoy = headers:get("content-type") == "text/plain"
  if from_envoy and http_status == "503" then
    headers:replace("retry-after", RETRY_AFTER)
  end
  if response:metadata():get("hosted") and tonumber(http_status) >= 400 then
    hosted_error(response, http_status)
  elseif from_envoy then
    headers:replace("content-type", "application/json")
    local body = response:body(true)
    local text = tostring(body:getBytes(0, body:length()))
    local metadata = response:streamInfo():dynamicMetadata():get("llama2") or {}
    if metadata["connect"] then
      connect_error(response, metadata["connect"], text)
    else
      replace_body(response, status_json(http_status, text, metadata))
    end
  end
end
