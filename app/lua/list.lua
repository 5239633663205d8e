-- A page of tasks, newest first; ties by id. KEYS: the sorted sets whose union is the list (they are disjoint).
-- ARGV: offset, limit, at most so many steps, filter as JSON {field: [values]}, organisation, then the fields to
-- answer with.
-- Answers {total, capped, {id, score, values…}…}. Without a filter the total is exact; with one, the walk ends
-- after so many steps and says `capped`.
local offset, limit, steps = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local filter = cjson.decode(ARGV[6])
local wanted, filtered = {}, {}
for i = 8, #ARGV do wanted[#wanted + 1] = ARGV[i] end
local accepted = {}
for name, values in pairs(filter) do
  filtered[#filtered + 1] = name
  accepted[name] = {}
  for _, value in ipairs(values) do accepted[name][value] = true end
end

local function newer(a, b)
  if a.score ~= b.score then return a.score > b.score end
  return a.id > b.id
end
-- The first `count` members of the union.
local function newest(skip, count)
  local merged = {}
  for _, source in ipairs(KEYS) do
    local found = redis.call('ZREVRANGE', source, skip, skip + count - 1, 'WITHSCORES')
    for i = 1, #found, 2 do merged[#merged + 1] = { id = found[i], score = tonumber(found[i + 1]) } end
  end
  if #KEYS > 1 then table.sort(merged, newer) end
  return merged
end

local page, total, members, capped = {}, 0, 0, '0'
for _, source in ipairs(KEYS) do members = members + redis.call('ZCARD', source) end
if #filtered > 0 then
  local merged = newest(0, steps)
  for i = 1, math.min(#merged, steps) do
    local values = redis.call('HMGET', key('task', ARGV[7] .. ':' .. merged[i].id), unpack(filtered))
    local matches = true
    for j, name in ipairs(filtered) do
      if not accepted[name][values[j] or ''] then matches = false end
    end
    if matches then
      total = total + 1
      if total > offset and total <= offset + limit then page[#page + 1] = merged[i] end
    end
  end
  if members > steps then capped = '1' end
else
  total = members
  if #KEYS == 1 then
    page = newest(offset, limit)
  else
    -- A merge reads every source down to the page, so its depth is bounded.
    local merged = newest(0, math.min(offset + limit, steps))
    for i = offset + 1, math.min(offset + limit, #merged, steps) do page[#page + 1] = merged[i] end
    if offset + limit > steps and total > steps then capped = '1' end
  end
end

local answer = { digits(total), capped }
for _, found in ipairs(page) do
  local values = redis.call('HMGET', key('task', ARGV[7] .. ':' .. found.id), unpack(wanted))
  table.insert(values, 1, digits(found.score))
  table.insert(values, 1, found.id)
  answer[#answer + 1] = values
end
return answer
