-- What Envoy's own filters leave open between the card's JSON and the service: one URL for both output forms, and one form
-- for every refusal, google.rpc.Status as JSON, whoever refuses.

local GENERATE = "/v1/generate"

-- The gRPC codes of what Envoy itself says no to.
local CODES = { ["400"] = 3, ["404"] = 12, ["405"] = 12, ["413"] = 8, ["415"] = 3, ["503"] = 14, ["504"] = 4 }
-- Envoy looks for healthy servers every so many seconds.
local RETRY_AFTER = "5"
-- What a field of a type has to be, nearly in the service's own words.
local TYPES = {
  TYPE_STRING = "must be of type string",
  TYPE_BOOL = "must be of type boolean",
  TYPE_DOUBLE = "must be of type number",
  TYPE_INT32 = "must be of type integer, in 32 bits",
  TYPE_UINT64 = "must be of type integer, not negative, in 64 bits",
}

-- The transcoder names the field and quotes the value, or some of the body's text, which is the caller's own: only the
-- field and its type go on.
local function wrong_type(text)
  local parent, name = text:match("^([%w_%.%[%]]*): invalid value Starting an object on a scalar field for type ([%w_]+)$")
  if name then
    return parent == "" and name or parent .. "." .. name, "must not be an object"
  end
  local field, kind = text:match("^([%w_%.%[%]]+): invalid value .* for type (%S+)$")
  if field then
    return field, TYPES[kind] or "must hold objects"
  end
  return "", "the body must be one JSON object with the fields of the request, each of its own type"
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
  -- A web page may post text and forms to any address without asking; JSON its browser sends only where CORS allows it.
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
  if pushback then
    headers:replace("retry-after", tostring(math.ceil(tonumber(pushback) / 1000)))
  end
  -- The service's own replies are JSON, events or gRPC; plain text is Envoy's.
  if headers:get("content-type") == "text/plain" then
    local http_status = headers:get(":status")
    headers:replace("content-type", "application/json")
    if http_status == "503" then
      headers:replace("retry-after", RETRY_AFTER)
    end
    local body = response:body(true)
    local length = body:setBytes(status_json(http_status, tostring(body:getBytes(0, body:length()))))
    response:headers():replace("content-length", tostring(length)) -- the object from before the wait for the body is stale
  end
end
